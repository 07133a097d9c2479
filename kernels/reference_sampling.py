"""What the op `sample` means, in plain PyTorch: a token per row of logits, the same on every machine, in any batch.

Order of the stages (bias and penalties as in vLLM and transformers, filters as in transformers' `generate`): logit
bias, repetition, frequency and presence penalty, allowed tokens, temperature, top-k, top-p, min-p, typical-p, choice.

Floating-point sums depend on their order, so no decision uses one. After the temperature each token gets an integer
weight `floor(2^40 * 2^-s)`, where `s >= 0` is its distance from the row's best logit in bits. All masses are sums of
these integers, exact in any order. The only float32 operations before that are correctly rounded ones (+, -, *, /,
floor). A backend that performs them in the order written here samples the same token.

Edge cases:
- a NaN logit counts as -inf, and +inf as the largest float32; the log-probability of such a row is NaN;
- top-k, top-p and typical-p keep or drop tokens of equal logits together: a tie at the threshold is kept
  (transformers does so in top-k and typical-p; its top-p keeps an arbitrary part of the tie);
- a token less likely than 2^-40 times the best one is never sampled;
- greedy sampling takes the first of equal maxima, and so does a row in which no token is allowed.
"""

import math

import torch
from torch import Tensor

UNIT_BITS = 40  # weight of the best token: 2^40, so that 2^17 tokens add up to less than 2^63
SHARE_BITS = 31  # fractions of a mass (top-p, the random number) are multiples of 2^-31
FLOAT32_MAX = torch.finfo(torch.float32).max
LOG2_E = 1 / math.log(2)

# 2^f on [0, 1], exact at both ends, relative error below 2e-7 in float32 (a minimax fit of degree 5).
EXP2_COEFFICIENTS = (0.0018793186, 0.0089909956, 0.055818677, 0.24015927, 0.69315171, 1.0)

# The largest top-k that `few_candidates` may be used with (see `sample`).
FEW_TOKENS = 64

# The arguments of `sample` that belong to `penalize` and to `filter_logits`.
PENALTIES = (
    "repetition_penalty",
    "presence_penalty",
    "frequency_penalty",
    "prompt_counts",
    "output_counts",
    "logit_bias",
    "allowed",
)
FILTERS = ("top_k", "top_p", "min_p", "typical_p")

PHILOX_MULTIPLIERS = (0xD2511F53, 0xCD9E8D57)
PHILOX_KEY_STEPS = (0x9E3779B9, 0xBB67AE85)
MASK32 = 0xFFFFFFFF


def sample(
    logits: Tensor,
    *,
    temperature: Tensor | None,
    top_k: Tensor | None = None,
    top_p: Tensor | None = None,
    min_p: Tensor | None = None,
    typical_p: Tensor | None = None,
    repetition_penalty: Tensor | None = None,
    presence_penalty: Tensor | None = None,
    frequency_penalty: Tensor | None = None,
    prompt_counts: Tensor | None = None,
    output_counts: Tensor | None = None,
    logit_bias: Tensor | None = None,
    allowed: Tensor | None = None,
    drafts: Tensor | None = None,
    seed: Tensor,
    stream: Tensor,
    position: Tensor,
    few_candidates: bool = False,
) -> tuple[Tensor, Tensor]:
    """Sample one token for each row of `logits` [B, V] (any float dtype). `None` turns a stage off for all rows.

    Per-row tensors are [B]: `temperature` float32 (0 = greedy; `None` = every row greedy), `top_k` int64 (<= 0 = off),
    `top_p`, `min_p`, `typical_p` and the three penalties float32. `prompt_counts` and `output_counts` int32 [B, V]
    count each token's occurrences in the prompt and in the generated text, `logit_bias` is float32 [B, V], `allowed` an
    int32 bit mask [B, ceil(V / 32)] (bit i % 32 of word i // 32: token i may be sampled). `seed`, `stream` and
    `position`, int64 (`position` may be int32), are the key of a row's one random number.

    `drafts` int64 [S, K]: the rows are K consecutive positions of S sequences, B = S * K, and the tensors over the
    vocabulary (counts, bias, mask) have one row for each sequence. Row j of a sequence counts its drafts 1 to j as
    generated.

    `few_candidates` is a hint that every sampled row with a top-k or a top-p has a `top_k` of 1 to `FEW_TOKENS`: a GPU
    then searches in fewer launches. The tokens are the same even where the hint is wrong.

    Returns the tokens, int64 [B], and their log-probabilities, float32 [B], under the softmax of the given `logits`
    (before bias, penalties and temperature, as vLLM reports them). Where bias, penalties and mask leave every token at
    -inf or NaN, the token is -1. Raises ValueError where a penalty lacks its counts.
    """
    x = penalize(
        logits,
        repetition_penalty=repetition_penalty,
        presence_penalty=presence_penalty,
        frequency_penalty=frequency_penalty,
        prompt_counts=prompt_counts,
        output_counts=output_counts,
        logit_bias=logit_bias,
        allowed=allowed,
        drafts=drafts,
    )
    token = x.max(-1).indices
    if temperature is not None:
        weights = _kept_weights(x, temperature, top_k, top_p, min_p, typical_p)
        mass = weights.cumsum(-1)
        total = mass[:, -1]
        random = philox(seed, stream, position)[0] >> (32 - SHARE_BITS)
        # The first token whose cumulative mass exceeds the point: never one of weight 0, which adds nothing.
        point = _share(total, random)
        sampled = torch.searchsorted(mass, point[:, None], right=True)[:, 0]
        token = torch.where((total == 0) | (temperature == 0), token, sampled)
    token = token.masked_fill(x.amax(-1) == -math.inf, -1)
    return token, log_probability(logits, token)


def penalize(
    logits: Tensor,
    *,
    repetition_penalty: Tensor | None = None,
    presence_penalty: Tensor | None = None,
    frequency_penalty: Tensor | None = None,
    prompt_counts: Tensor | None = None,
    output_counts: Tensor | None = None,
    logit_bias: Tensor | None = None,
    allowed: Tensor | None = None,
    drafts: Tensor | None = None,
) -> Tensor:
    """Logits after bias, penalties and mask: float32 [B, V], finite or -inf. Arguments as in `sample`.

    Repetition: the logit of a token in the prompt or the output is divided if positive, else multiplied. Frequency and
    presence: subtract `frequency_penalty * count` and `presence_penalty` for tokens in the output.
    """
    x = logits.float()
    if drafts is not None:
        prompt_counts, logit_bias, allowed = (
            None if table is None else table.repeat_interleave(drafts.shape[1], 0)
            for table in (prompt_counts, logit_bias, allowed)
        )
        output_counts = None if output_counts is None else _with_drafts(output_counts, drafts)
    if logit_bias is not None:
        x = x + logit_bias
    check_counts(repetition_penalty, presence_penalty, frequency_penalty, prompt_counts, output_counts)
    if repetition_penalty is not None:
        penalty = repetition_penalty[:, None]
        penalized = x.clamp(min=0) / penalty + x.clamp(max=0) * penalty  # one of the two is 0
        x = torch.where(_seen(prompt_counts, output_counts), penalized, x)
    if frequency_penalty is not None and output_counts is not None:
        x = x - frequency_penalty[:, None] * output_counts
    if presence_penalty is not None and output_counts is not None:
        x = x - presence_penalty[:, None] * (output_counts > 0)
    x = x.nan_to_num(nan=-math.inf, posinf=FLOAT32_MAX, neginf=-math.inf)
    if allowed is not None:
        bits = torch.arange(32, device=x.device, dtype=torch.int32)
        mask = (allowed[:, :, None] >> bits & 1).flatten(1)[:, : x.shape[1]]
        x = x.masked_fill(mask == 0, -math.inf)
    return x


def filter_logits(
    x: Tensor,
    *,
    temperature: Tensor,
    top_k: Tensor | None = None,
    top_p: Tensor | None = None,
    min_p: Tensor | None = None,
    typical_p: Tensor | None = None,
) -> Tensor:
    """The distribution that `sample` samples from, as float32 logits [B, V]: `x / temperature`, -inf where dropped.

    `x` is the result of `penalize`. At temperature 0 the maxima are kept, undivided.
    """
    weights = _kept_weights(x, temperature, top_k, top_p, min_p, typical_p)
    divisor = torch.where(temperature == 0, 1, temperature)
    return (x / divisor[:, None]).masked_fill(weights == 0, -math.inf)


def philox(seed: Tensor, stream: Tensor, position: Tensor) -> Tensor:
    """Philox4x32-10 (Salmon et al., "Parallel random numbers: as easy as 1, 2, 3", 2011): four 32-bit words per row.

    Key: `seed`; counter: `position` in the low and `stream` in the high 64 bits; int64 [B] -> int64 [4, B].
    """
    rounds = torch.arange(10, dtype=torch.int64, device=seed.device)[:, None, None]
    constants = torch.tensor((PHILOX_MULTIPLIERS, PHILOX_KEY_STEPS), dtype=torch.int64, device=seed.device)
    multiplier, step = constants[:, :, None]
    keys = torch.stack((seed, seed >> 32)) + rounds * step & MASK32
    position = position.long()
    even = torch.stack((position, stream)) & MASK32  # words 0 and 2 of the counter
    odd = torch.stack((position, stream)) >> 32 & MASK32  # words 1 and 3
    for key in keys:
        product = (even * multiplier).flip(0)  # modulo 2^64, which is the whole unsigned product
        even = (product >> 32 ^ odd ^ key) & MASK32
        odd = product & MASK32
    return torch.stack((even[0], odd[0], even[1], odd[1]))


def check_counts(
    repetition_penalty: Tensor | None,
    presence_penalty: Tensor | None,
    frequency_penalty: Tensor | None,
    prompt_counts: Tensor | None,
    output_counts: Tensor | None,
) -> None:
    """Raises ValueError where a penalty lacks the counts that it needs."""
    if repetition_penalty is not None and prompt_counts is None and output_counts is None:
        raise ValueError("repetition_penalty needs prompt_counts or output_counts; pass at least one of them")
    if output_counts is None:
        for name, penalty in (("presence_penalty", presence_penalty), ("frequency_penalty", frequency_penalty)):
            if penalty is not None:
                raise ValueError(f"{name} needs output_counts, how often each token occurs in the generated text")


def _with_drafts(output_counts: Tensor, drafts: Tensor) -> Tensor:
    """[S * K, V]: what each row of S sequences has generated if drafts [S, K] 1 to j stand before row j."""
    S, K = drafts.shape
    counts = output_counts[:, None].repeat(1, K, 1)
    for j in range(1, K):
        drafted = drafts[:, j, None, None].expand(S, K - j, 1)
        counts[:, j:].scatter_add_(2, drafted, torch.ones_like(drafted, dtype=counts.dtype))
    return counts.flatten(0, 1)


def _seen(prompt_counts: Tensor | None, output_counts: Tensor | None) -> Tensor:
    """bool [B, V]: whether the token occurs in the prompt or in the output."""
    first, *rest = [counts > 0 for counts in (prompt_counts, output_counts) if counts is not None]
    return first | rest[0] if rest else first


def _kept_weights(
    x: Tensor,
    temperature: Tensor,
    top_k: Tensor | None,
    top_p: Tensor | None,
    min_p: Tensor | None,
    typical_p: Tensor | None,
) -> Tensor:
    """Integer weights [B, V], 0 for the tokens that the filters drop. Each filter sees what the one before it kept."""
    best = x.amax(-1, keepdim=True).clamp(min=-FLOAT32_MAX)  # finite, so that -inf - best is -inf in a row of -inf
    sharpness = (temperature.reciprocal() * LOG2_E).clamp(max=FLOAT32_MAX)[:, None]  # temperature 0 keeps maxima only
    scaled = (x - best) * sharpness
    weights = _weights(scaled)
    keys = _order_keys(x) if top_k is not None or top_p is not None else None
    if top_k is not None and keys is not None:
        count = torch.where(top_k <= 0, x.shape[1], top_k.clamp(max=x.shape[1]))
        weights = torch.where(keys >= _threshold(keys, torch.ones_like(weights), count), weights, 0)
    if top_p is not None and keys is not None:
        weights = torch.where(keys >= _threshold(keys, weights, _share_of_total(weights, top_p)), weights, 0)
    if min_p is not None:
        weights = torch.where(weights >= (min_p * 2**UNIT_BITS).long()[:, None], weights, 0)
    if typical_p is not None:
        # |-log p - entropy| in bits: the entropy is the mean of -log p, so the normaliser drops out of the difference.
        mean = (scaled.clamp(min=-63) * weights.float()).long().sum(-1).float() / weights.sum(-1).float()
        keys = MASK32 - _order_keys((scaled - mean[:, None]).abs())
        weights = torch.where(keys >= _threshold(keys, weights, _share_of_total(weights, typical_p)), weights, 0)
    return weights


def _weights(scaled: Tensor) -> Tensor:
    """floor(2^40 * 2^scaled) for float32 `scaled` <= 0, as int64; bit-identical on every backend."""
    scaled = scaled.clamp(min=-63)
    whole = scaled.floor()
    fraction = scaled.sub_(whole)
    power = fraction * EXP2_COEFFICIENTS[0]
    for coefficient in EXP2_COEFFICIENTS[1:-1]:
        power.add_(coefficient).mul_(fraction)
    power.add_(EXP2_COEFFICIENTS[-1])
    exponent = whole.int().add_(127 + UNIT_BITS).bitwise_left_shift_(23)  # the bits of the float32 2^(40 + whole)
    return power.mul_(exponent.view(torch.float32)).long()


def _order_keys(x: Tensor) -> Tensor:
    """int64 in [0, 2^32), in the order of the float32 `x`."""
    bits = (x + 0.0).view(torch.int32)  # -0.0 becomes 0.0
    return (bits ^ (bits >> 31 & 0x7FFFFFFF)).long() + 2**31


def _threshold(keys: Tensor, weights: Tensor, target: Tensor) -> Tensor:
    """[B, 1]: the largest key t such that the `weights` of all keys >= t reach `target` [B] (at most their sum).

    Finds t digit by digit, from the highest 11 bits down, by a histogram of the weights over the next digit of the keys
    that agree with t so far; two outer bins take the keys below and above those.
    """
    spare = (weights.sum(-1) - target)[:, None]  # keys < t weigh this much at most
    prefix = torch.zeros_like(spare)
    for shift, bits in ((21, 11), (10, 11), (0, 10)):
        bins = (keys >> shift).sub_((prefix << bits) - 1).clamp_(0, 2**bits + 1)
        histogram = weights.new_zeros(len(keys), 2**bits + 2).scatter_add_(1, bins, weights)
        digit = torch.searchsorted(histogram.cumsum_(1), spare, right=True) - 1
        prefix = (prefix << bits) + digit
    return prefix


def _share(total: Tensor, share: Tensor) -> Tensor:
    """floor(total * share / 2^31) without overflow, for 0 <= total < 2^62 and 0 <= share <= 2^31."""
    low = total & (2**SHARE_BITS - 1)
    return (total >> SHARE_BITS) * share + (low * share >> SHARE_BITS)


def _share_of_total(weights: Tensor, fraction: Tensor) -> Tensor:
    return _share(weights.sum(-1), (fraction * 2**SHARE_BITS).long()).clamp(min=1)


def log_probability(logits: Tensor, token: Tensor) -> Tensor:
    """Natural log-softmax [B, V] at one token or several of each row.

    `token`: int64 [B] or [B, K]. Returns float32 of that shape: -inf for token -1, NaN where a row has NaN or +inf. A
    token's value does not depend on the others.
    """
    x = logits.to(torch.float32, copy=True)
    best = x.amax(-1, keepdim=True)
    wanted = token.view(len(token), -1)
    chosen = x.gather(1, wanted.clamp(min=0)).masked_fill(wanted < 0, -math.inf)
    # Integers again: a float sum would depend on how the row is split over threads. In place, since allocating memory
    # takes a CPU longer than the arithmetic, 4 times as long for 128512 tokens.
    total = x.sub_(best).exp_().mul_(2**UNIT_BITS).long().sum(-1, keepdim=True)
    log_total = (total.double() / 2**UNIT_BITS).log()
    return (chosen - best - log_total).float().view_as(token)
