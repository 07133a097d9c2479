"""AsyncLLM: what LLM gives, for any number of tasks; cancels, slow readers, errors, and the end of its thread."""

import asyncio
import gc
import threading
import weakref
from contextlib import aclosing

import pytest

from internlm3 import LLM, AsyncLLM, QueueFull
from internlm3.runtime.engine.answer import Answer
from internlm3.runtime.engine.runner import Runner
from internlm3.tests.support.engine import slow_steps
from internlm3.tests.support.llm import PROMPTS, result

CHAT = [{"role": "user", "content": "Say something."}]
SAMPLED = {"temperature": 0.9, "top_p": 0.95, "seed": 7}


@pytest.fixture(scope="module")
def tiny(make):
    return LLM(make(max_position_embeddings=2048), progress=False)


@pytest.fixture
def asynchronous(tiny):
    llm = AsyncLLM(tiny)
    yield llm
    llm.close()


def shape(outputs):
    """The results of one output or of several, without what depends on earlier calls."""
    return [result(each) for each in outputs] if isinstance(outputs, list) else result(outputs)


async def idle(llm: AsyncLLM) -> None:
    """Waits until no request waits or runs."""
    while llm.llm.engine.busy or llm.waiting:
        await asyncio.sleep(0.001)


async def text_of(llm, prompt, **settings):
    chunks = [chunk async for chunk in llm.stream(prompt, **settings)]
    assert [chunk.finish_reason is None for chunk in chunks] == [True] * (len(chunks) - 1) + [False]
    ids = [token for chunk in chunks for token in chunk.token_ids]
    assert chunks[-1].decode_tokens == len(ids)
    return "".join(chunk.text for chunk in chunks), ids, chunks[-1].finish_reason


def test_it_gives_what_llm_gives(tiny, asynchronous):
    async def calls():
        return [
            await asynchronous.generate(PROMPTS, max_tokens=8, **SAMPLED),
            await asynchronous.generate(PROMPTS[0], max_tokens=8, n=3, **SAMPLED),
            await asynchronous.generate([5, 6, 7], max_tokens=8, temperature=0, logprobs=3),
            await asynchronous.chat(CHAT, max_tokens=8, **SAMPLED),
        ]

    assert [shape(each) for each in asyncio.run(calls())] == [
        shape(tiny.generate(PROMPTS, max_tokens=8, **SAMPLED)),
        shape(tiny.generate(PROMPTS[0], max_tokens=8, n=3, **SAMPLED)),
        shape(tiny.generate([5, 6, 7], max_tokens=8, temperature=0, logprobs=3)),
        shape(tiny.chat(CHAT, max_tokens=8, **SAMPLED)),
    ]


def test_streams_are_what_generate_gives(tiny, asynchronous):
    async def streams():
        return await asyncio.gather(*(text_of(asynchronous, prompt, max_tokens=20, **SAMPLED) for prompt in PROMPTS))

    expected = [tiny.generate(prompt, max_tokens=20, **SAMPLED).outputs[0] for prompt in PROMPTS]
    assert asyncio.run(streams()) == [(each.text, each.token_ids, each.finish_reason) for each in expected]


@pytest.mark.parametrize("door", [AsyncLLM, None])
def test_a_stream_answers_several_prompts(tiny, asynchronous, door):
    async def chunks():
        return [chunk async for chunk in asynchronous.stream(PROMPTS, n=2, max_tokens=9, **SAMPLED)]

    settings = {"n": 2, "max_tokens": 9, **SAMPLED}
    got = asyncio.run(chunks()) if door else list(tiny.stream(PROMPTS, **settings))
    texts = {}
    for chunk in got:
        place = chunk.prompt_index, chunk.index
        texts[place] = texts.get(place, "") + chunk.text
    outputs = tiny.generate(PROMPTS, **settings)
    assert texts == {(place, each.index): each.text for place, output in enumerate(outputs) for each in output.outputs}
    assert sum(chunk.finish_reason is not None for chunk in got) == 2 * len(PROMPTS)


@pytest.mark.parametrize("door", [AsyncLLM, None])
def test_a_stream_has_n_answers(tiny, asynchronous, door):
    async def chunks():
        return [chunk async for chunk in asynchronous.stream(PROMPTS[0], n=3, max_tokens=9, **SAMPLED)]

    settings = {"n": 3, "max_tokens": 9, **SAMPLED}
    got = asyncio.run(chunks()) if door else list(tiny.stream(PROMPTS[0], **settings))
    texts = ["".join(chunk.text for chunk in got if chunk.index == index) for index in range(3)]
    assert texts == [each.text for each in tiny.generate(PROMPTS[0], **settings).outputs]
    assert sum(chunk.finish_reason is not None for chunk in got) == 3


def test_two_event_loops_and_a_thread_share_one_engine(tiny, asynchronous):
    expected = {prompt: tiny.generate(prompt, max_tokens=15, **SAMPLED).text for prompt in PROMPTS}
    wrong = []

    def in_a_loop():
        async def streams():
            return await asyncio.gather(
                *(text_of(asynchronous, prompt, max_tokens=15, **SAMPLED) for prompt in PROMPTS)
            )

        wrong.extend({text for text, _, _ in asyncio.run(streams())} ^ set(expected.values()))

    def in_a_thread():
        for prompt in PROMPTS:
            wrong.extend({tiny.generate(prompt, max_tokens=15, **SAMPLED).text} - {expected[prompt]})

    threads = [threading.Thread(target=each) for each in (in_a_loop, in_a_loop, in_a_thread)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert not wrong and not tiny.engine.busy


@pytest.mark.parametrize("how", ["close", "cancel", "break"])
def test_an_answer_that_nobody_awaits_is_gone_before_the_next_step(tiny, asynchronous, monkeypatch, how):
    """Its row and pages are free when the next step begins, and another stream goes on."""
    running = []
    step = Runner.step
    monkeypatch.setattr(Runner, "step", lambda self: (running.append(len(self.scheduler.active)), step(self))[1])
    other = {"max_tokens": 40, "ignore_eos": True, **SAMPLED}

    async def lost(begun):
        async with aclosing(asynchronous.stream("hello", max_tokens=900, ignore_eos=True)) as stream:
            async for _ in stream:
                begun.set()
                if how == "break":
                    break
                if how == "close":
                    await stream.aclose()
                    break

    async def main():
        begun = asyncio.Event()
        task = asyncio.create_task(lost(begun))
        await begun.wait()
        if how == "cancel":
            task.cancel()
        await asyncio.gather(task, return_exceptions=True)
        # What was asked for is done before the step that this request waits for.
        first = len(running)
        text = await asynchronous.generate("another", **other)
        assert running[first + 1 :] and max(running[first + 1 :]) <= 1
        await idle(asynchronous)
        return text

    assert shape(asyncio.run(main())) == shape(tiny.generate("another", **other))
    assert tiny.engine.pages.free == len(tiny.engine.pages)


def test_a_slow_reader_gets_several_tokens_at_once_and_holds_up_nobody(tiny, asynchronous):
    settings = {"max_tokens": 40, "ignore_eos": True, **SAMPLED}

    async def main():
        slow = asynchronous.stream("slow", **settings)
        first = await anext(slow)
        fast = await asynchronous.generate("fast", **{**settings, "max_tokens": 50})
        await idle(asynchronous)
        rest = [chunk async for chunk in slow]
        return fast, [first, *rest]

    fast, chunks = asyncio.run(main())
    assert shape(fast) == shape(tiny.generate("fast", **{**settings, "max_tokens": 50}))
    expected = tiny.generate("slow", **settings).outputs[0]
    assert len(chunks) <= 3 and "".join(chunk.text for chunk in chunks) == expected.text
    assert [value for chunk in chunks for value in chunk.logprobs] == pytest.approx(expected.logprobs, abs=1e-4)


def test_more_requests_than_may_wait_are_refused(tiny):
    llm = AsyncLLM(tiny, max_waiting=5)

    async def main():
        with tiny.engine._lock:  # no step begins
            accepted = [asyncio.create_task(llm.generate(f"number {number}", max_tokens=3)) for number in range(5)]
            while llm.waiting < 5:
                await asyncio.sleep(0.001)
            with pytest.raises(QueueFull, match="6 requests would wait, and at most 5 may"):
                await llm.generate("too many")
            with pytest.raises(QueueFull):
                await anext(llm.stream("too many"))
            assert llm.waiting == 5
        return await asyncio.gather(*accepted)

    assert len(asyncio.run(main())) == 5 and llm.waiting == 0
    llm.close()
    with pytest.raises(ValueError, match="max_waiting"):
        AsyncLLM(tiny, max_waiting=0)


def test_requests_that_wait_cost_a_step_nothing(tiny, monkeypatch, asynchronous):
    reads = []
    read = Answer.read
    monkeypatch.setattr(Answer, "read", lambda self: (reads.append(1), read(self))[1])

    async def main():
        prompts = [[1 + number % 50, 5, 9] for number in range(150)]
        return await asynchronous.generate(prompts, max_tokens=3, ignore_eos=True, temperature=0)

    assert len(asyncio.run(main())) == 150
    # Each token is read once, and after it comes a read that finds nothing more; with no step for all 150.
    assert len(reads) <= 2 * 3 * 150


def test_an_error_in_a_step_ends_all_that_share_it_and_no_later_one(tiny, asynchronous, monkeypatch):
    """Its exception is the cause of what the readers get."""
    broken = OSError("the device is lost")

    def step(self):
        raise broken

    async def main():
        with monkeypatch.context() as patch:
            patch.setattr(Runner, "step", step)
            return await asyncio.gather(
                *(asynchronous.generate(prompt, max_tokens=9) for prompt in PROMPTS), return_exceptions=True
            )

    for error in asyncio.run(main()):
        assert isinstance(error, RuntimeError) and "broken off" in str(error) and error.__cause__ is broken
    expected = tiny.generate("two", max_tokens=9, temperature=0)
    assert shape(asyncio.run(asynchronous.generate("two", max_tokens=9, temperature=0))) == shape(expected)


def test_mistakes_are_raised_where_the_call_is_made(asynchronous):
    async def both(prompt, **settings):
        with pytest.raises((TypeError, ValueError)) as raised:
            await asynchronous.generate(prompt, **settings)
        with pytest.raises((TypeError, ValueError)) as again:
            await anext(asynchronous.stream(prompt, **settings))
        assert str(raised.value) == str(again.value)
        return str(raised.value)

    assert "empty" in asyncio.run(both(""))
    assert "temperature" in asyncio.run(both("hi", temperature=-1))
    assert "max_tokens" in asyncio.run(both("hi", max_tokns=3))


def test_close_ends_what_is_under_way(tiny, monkeypatch):
    slow_steps(monkeypatch)

    async def main():
        async with AsyncLLM(tiny) as llm:
            stream = llm.stream("hello", max_tokens=900, ignore_eos=True)
            await anext(stream)
        with pytest.raises(RuntimeError, match="broken off") as raised:
            async for _ in stream:
                pass
        assert "closed" in str(raised.value.__cause__)
        with pytest.raises(RuntimeError, match="closed"):
            await llm.generate("hello")

    asyncio.run(main())
    assert not tiny.engine.busy


def test_dropping_it_ends_its_thread_and_frees_the_model(tiny_folder):
    llm = AsyncLLM(tiny_folder, progress=False)
    asyncio.run(llm.generate("hello", max_tokens=2))
    thread, model = llm._thread._thread, weakref.ref(llm.llm.model)
    assert thread.is_alive()
    del llm
    gc.collect()
    thread.join(timeout=60)
    assert not thread.is_alive() and model() is None


def test_under_uvloop(tiny, asynchronous):
    uvloop = pytest.importorskip("uvloop", reason="uvloop is not made for Windows")
    with asyncio.Runner(loop_factory=uvloop.new_event_loop) as runner:
        text, _, _ = runner.run(text_of(asynchronous, "hello", max_tokens=9, **SAMPLED))
    assert text == tiny.generate("hello", max_tokens=9, **SAMPLED).text


def test_an_llm_takes_no_second_set_of_keywords(tiny):
    with pytest.raises(TypeError, match="max_batch_size: give these to the LLM"):
        AsyncLLM(tiny, max_batch_size=2)
