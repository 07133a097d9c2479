"""The chat page: Markdown becomes elements, and never anything that runs or that comes from elsewhere."""

import json
import random

import pytest

from internlm3.tests.support.chat_server import chat_server

# What an answer may have; "|" is where a line of HTML would be hard to read.
CASES = {
    "# One\n### Three": "<h1>One</h1><h3>Three</h3>",
    "a\nb\n\nc": "<p>a\nb</p><p>c</p>",
    "#no heading": "<p>#no heading</p>",
    "**b** *i* ***bi***": "<p><strong>b</strong> <em>i</em> <em><strong>bi</strong></em></p>",
    "__b__ _i_": "<p><strong>b</strong> <em>i</em></p>",
    "**a *b***": "<p><strong>a <em>b</em></strong></p>",
    "中文**粗体**中文": "<p>中文<strong>粗体</strong>中文</p>",
    "2 * 3 * 4, snake_case_name, **open": "<p>2 * 3 * 4, snake_case_name, **open</p>",
    r"\*no\* \d \[x\] \\(a\\)": r"<p>*no* \d [x] \\(a\\)</p>",
    "`a*b*` and `` a`b `` and `open": "<p><code>a*b*</code> and <code>a`b</code> and `open</p>",
    "- a\n- b\n  - c\n\t- d\n- e": "<ul><li><p>a</p></li><li><p>b</p><ul><li><p>c</p></li><li><p>d</p></li></ul></li>"
    "<li><p>e</p></li></ul>",
    "3. a\n   more\n\n4. b\n   - c": '<ol start="3"><li><p>a\nmore</p></li><li><p>b</p><ul><li><p>c</p></li></ul></li>'
    "</ol>",
    "- a\n\nb": "<ul><li><p>a</p></li></ul><p>b</p>",
    "> a\n> - b": "<blockquote><p>a</p><ul><li><p>b</p></li></ul></blockquote>",
    "a\n\n---\nb": "<p>a</p><hr><p>b</p>",
    "| a | b |\n|---|:-:|\n| `x` | 2 |\n| 3 |": "<div><table><thead><tr><th>a</th><th>b</th></tr></thead><tbody>"
    "<tr><td><code>x</code></td><td>2</td></tr><tr><td>3</td><td></td></tr></tbody></table></div>",
    "a | b": "<p>a | b</p>",
    "```py\nif a:\n\tb\n\n<i>\n```\nend": "<div><div><span>py</span></div><pre><code>if a:\n\tb\n\n&lt;i&gt;</code>"
    "</pre></div><p>end</p>",
    "- a\n  ```\n  x\n    y\n  ```": "<ul><li><p>a</p><div><div><span></span></div><pre><code>x\n  y</code></pre></div>"
    "</li></ul>",
    "````\n```\n````": "<div><div><span></span></div><pre><code>```</code></pre></div>",
    "[x](https://a.example/b_(c)) ![y](https://a.example/d.png)": '<p><a href="https://a.example/b_(c)">x</a> '
    '<a href="https://a.example/d.png">y</a></p>',
    "See https://a.example/b_c, (http://d.example).": '<p>See <a href="https://a.example/b_c">https://a.example/b_c</a>'
    ', (<a href="http://d.example">http://d.example</a>).</p>',
    "[**x**](mailto:a@b.example)": '<p><a href="mailto:a@b.example"><strong>x</strong></a></p>',
    "见https://a.example。": '<p>见<a href="https://a.example">https://a.example</a>。</p>',
}  # fmt: skip
# The page's own rendering of a text, without the attributes that have nothing to do with it.
HTML = """(() => {
  const root = document.createElement("div");
  markdown(root)(TEXT);
  for (const node of root.querySelectorAll("button")) node.remove();
  for (const node of root.querySelectorAll("*"))
    for (const name of ["class", "target", "rel", "tabindex"]) node.removeAttribute(name);
  return root.innerHTML;
})()"""


def html(page, text):
    return page.run(HTML.replace("TEXT", json.dumps(text)))


@pytest.fixture(scope="module")
def still_page(browser):
    """A page for its functions, which no test changes."""
    with chat_server() as server, browser.page() as page:
        page.open(server.url)
        page.wait("model")
        yield page


def test_markdown(still_page):
    assert {text: html(still_page, text) for text in CASES} == CASES


def test_what_streams_in_looks_like_what_came_at_once(still_page):
    """Any parts of any texts: what is shown after each part is the rendering of the text so far."""
    draw = random.Random(0)
    texts = ["\n\n".join(draw.sample(list(CASES), 6)) for _ in range(12)]
    texts += ["\n".join(draw.sample(list(CASES), 6)) for _ in range(12)]
    marks = [*"*`a|b\t\\\n", "\n\n", "- ", "  ", "1. ", "---", "```", "> ", "# ", "[x](", "\r\n"]
    texts += ["".join(draw.choices(marks, k=40)) for _ in range(150)]
    differ = """(texts => texts.filter(text => {
      const root = document.createElement("div");
      const show = markdown(root);
      for (let end = 0; end <= text.length; end++) {
        show(text.slice(0, end));
        const whole = document.createElement("div");
        markdown(whole)(text.slice(0, end));
        if (root.innerHTML !== whole.innerHTML) return true;
      }
    }))"""
    assert still_page.run(f"{differ}({json.dumps(texts)})") == []


def test_finished_blocks_are_not_made_again(still_page):
    text = "# One\n\nTwo **three**\n\n- four\n\n```\nfive\n```\n\nsix\n\nseven"
    made_again = """(text => {
      const root = document.createElement("div");
      const show = markdown(root);
      const before = [];
      for (let end = 0; end <= text.length; end++) {
        show(text.slice(0, end));
        // The last block may change, and the one before it while the last has but part of a line.
        [...root.children].slice(0, -2).forEach((node, n) => {
          before[n] ??= node;
          if (before[n] !== node) throw new Error(`${n} at ${end}`);
        });
      }
      return before.length;
    })"""
    assert still_page.run(f"{made_again}({json.dumps(text)})") == 4


def test_code_that_streams_in_stays_the_same_node(still_page):
    same = """(() => {
      const root = document.createElement("div");
      const show = markdown(root);
      show("```py\\na");
      const content = root.querySelector("code").firstChild;
      show("```py\\na = 1\\n``");
      show("```py\\na = 1\\n```\\n");
      return root.querySelector("code").firstChild === content && content.data;
    })()"""
    assert still_page.run(same) == "a = 1"


ATTACKS = [
    "<script>hacked = 1</script>",
    "<img src=x onerror=hacked=1>",
    "<iframe srcdoc='<script>parent.hacked = 1</script>'></iframe>",
    "[x](javascript:hacked=1)",
    "[x](JaVaScRiPt:hacked=1) [x](<javascript:hacked=1>) [x](\tjavascript:hacked=1)",
    "[x](java\tscript:hacked=1) [x](java&#115;cript:hacked=1)",
    "[x](data:text/html,<script>hacked=1</script>) [x](vbscript:x) [x](file:///etc/passwd) [x](blob:x)",
    "![x](https://elsewhere.example/pixel.png)",
    '[x](https://a.example/"onmouseover="hacked=1)',
    '[x](https://a.example "title" onclick=hacked=1)',
    "```<img src=x onerror=hacked=1>\n<script>hacked = 1</script>\n```",
    "| <img src=x onerror=hacked=1> |\n|---|\n| <svg onload=hacked=1> |",
    "# <svg><animate onbegin=hacked=1></svg>",
    "`<b onclick=hacked=1>`",
    "<https://a.example/<script>hacked=1</script>>",
    "\u2028<style>*{display:none}</style>&lt;img src=x onerror=hacked=1&gt;",
    "__proto__ constructor [x](__proto__)",
]
TAGS = {"A", "BLOCKQUOTE", "BUTTON", "CODE", "DIV", "EM", "H1", "H2", "H3", "H4", "H5", "H6", "HR", "LI", "OL", "P",
        "PRE", "SPAN", "STRONG", "TABLE", "TBODY", "TD", "TH", "THEAD", "TR", "UL"}  # fmt: skip


@pytest.mark.parametrize("by_server", [False, True], ids=["answer", "error"])
def test_a_text_runs_nothing_and_loads_nothing(page, server, by_server):
    """In an answer, in an error of the server, in the user's own message."""
    attack = "\n\n".join(ATTACKS)
    page.call("Network.enable")
    page.type(attack)
    page.press("Enter")
    server.say(attack)
    if by_server:
        server.fail(attack)
    else:
        server.finish()
    page.wait("!running")
    nodes = page.run(
        "[...document.querySelectorAll('article .body *, article .error *')].map(node =>"
        " [node.tagName, Object.fromEntries([...node.attributes].map(each => [each.name, each.value]))])"
    )
    assert {tag for tag, _ in nodes} <= TAGS
    for tag, attributes in nodes:
        assert not any(name.startswith("on") or name in ("src", "srcdoc") for name in attributes)
        assert tag != "A" or attributes["rel"] == "noopener noreferrer"
    addresses = {attributes["href"] for _, attributes in nodes if "href" in attributes}
    assert addresses and all(
        address.startswith(("https://a.example", "https://elsewhere.example")) for address in addresses
    )
    page.run("document.querySelectorAll('.assistant .body *').forEach(each => each.tagName === 'A' || each.click())")
    assert page.run("typeof hacked") == "undefined"
    asked = [event["params"]["request"]["url"] for event in page.browser.events
             if event.get("method") == "Network.requestWillBeSent" and event["sessionId"] == page.session]  # fmt: skip
    assert asked and all(url.startswith(server.url) for url in asked)


def test_the_browser_enforces_the_policy(browser, server):
    """Were there a fault in the page, the policy would stop it."""
    with browser.page() as page:
        page.open(server.url)
        tried = """(async () => {
          const done = [];
          const blocked = new Set();
          addEventListener("securitypolicyviolation", event => blocked.add(event.effectiveDirective));
          try { document.body.innerHTML = "<b>"; done.push("markup"); } catch {}
          try { (0, eval)("1"); done.push("eval"); } catch {}
          try { document.createElement("script").text = "1"; done.push("script"); } catch {}
          await fetch("http://localhost:1/").then(() => done.push("fetch"), () => {});
          document.body.append(Object.assign(new Image(), {src: "http://localhost:1/x.png"}));
          while (!blocked.has("img-src")) await new Promise(later => setTimeout(later));
          return [done, [...blocked].sort()];
        })()"""
        assert page.run(tried) == [[], ["connect-src", "img-src", "require-trusted-types-for"]]
        browser.events.clear()  # the browser has reported all of these


ODD = ["> " * 3000, "- " * 3000 + "x", "*a **b " * 3000, "[" * 20000, "x" + "`" * 20000, "[x](" * 5000,
       "``" + "\n`a" * 3000, "``` " + "a " * 10000 + "`", "|" * 20000 + "\n" + "|-" * 9000, "1. " * 5000,
       "https://" * 5000, "a_" * 20000, "` `` " * 5000, "x" + " " * 20000 + "|\n|" + " " * 20000 + "x"]  # fmt: skip


def test_odd_texts_are_shown(still_page):
    """No text is so odd that its rendering fails, or takes minutes, for which the browser would be silent."""
    for text in ODD:
        assert len(html(still_page, text)) > 1000, text[:20]
