"""The step of many tensors in one launch, which reads and writes each byte once: `rules` in Triton.

A program updates a tile of `BLOCK` entries of one tensor, in float32. It finds the tensor in a table (`tables`), so
that number, shapes and selections of the tensors do not matter. A tensor is updated by the state-full rule as a whole,
or by the state-free rule; or it is a matrix with selected lines (rows or columns): an entry of a selected line has
moments, stored compactly in ascending order of the lines, and every other entry has the state-free update.

`step_codes` is the same for moments stored in 8 bits (`eight_bits`): they are decoded, updated, and encoded with new
scales in registers, so that no float copy of them exists. Its tiles are of whole groups of entries that share a scale.

The tests run it on a CPU, in Triton's interpreter (`TRITON_INTERPRET=1`).
"""

from __future__ import annotations

import triton
import triton.language as tl

from adafrugal.optim import eight_bits

BLOCK = 1024  # entries of a tile; with more, an H100 and an H200 move fewer bytes a second
WARPS = 8
RUN = 16  # tiles of one part that share an entry of `owners`

# columns of the table, an int64 row for each part of a tensor (`tables.Part`): pointers, then numbers
COLUMNS = (
    "weight", "exp_avg", "exp_avg_sq", "scale", "scale_sq", "steps", "slots", "kind", "size", "length", "width",
    "first_tile", "number", "first_weight", "first_moment",
)  # fmt: skip
(_WEIGHT, _EXP_AVG, _EXP_AVG_SQ, _SCALE, _SCALE_SQ, _STEPS, _SLOTS, _KIND, _SIZE, _LENGTH, _WIDTH, _FIRST_TILE, _NUMBER,
 _FIRST_WEIGHT, _FIRST_MOMENT) = (tl.constexpr(i) for i in range(len(COLUMNS)))  # fmt: skip
_N_COLUMNS = tl.constexpr(len(COLUMNS))
_GROUP = tl.constexpr(eight_bits.BLOCK)
KINDS = ("free", "full", "rows", "columns")  # of `tables.Part`
_FREE, _FULL, _ROWS, _SELECTED_COLUMNS = (tl.constexpr(i) for i in range(len(KINDS)))


@triton.jit(do_not_specialize=["key"])
def step(
    owners, table, grads, weight, grad, moment, lr, lr_free, kept, beta1, beta2, rest1, rest2, log1, log2, eps, key,
    RULE: tl.constexpr, RULE_FREE: tl.constexpr, OWN_STEPS: tl.constexpr, STOCHASTIC: tl.constexpr,
    ON_DEVICE: tl.constexpr, ALIGNED: tl.constexpr, BLOCK: tl.constexpr, RUN: tl.constexpr,
):  # fmt: skip
    """Update a tile: `W ← W·kept`, then by rule `RULE` with lr or `RULE_FREE` with lr_free.

    Args:
        owners: int32 [programs / RUN], the part of each run of programs.
        table, grads: int64 [parts, COLUMNS], and [parts], pointers to the gradients.
        weight, grad, moment: any tensors of the dtypes of all.
        lr, lr_free, kept: the rates, and 1 − decay; numbers, or if ON_DEVICE float32 [1], which each replay reads.
        beta1, beta2, rest1, rest2, log1, log2, eps: β, 1 − β, ln β, and ε.
        key: of the noise at this step (`rounding.noise_key`).
        OWN_STEPS: whether each selected line has a step count of its own.
        STOCHASTIC, ALIGNED: whether to round bfloat16 so; whether all pointers and sizes are multiples of 16.
    """
    program = tl.program_id(0)
    part = tl.load(owners + program // RUN)
    row = table + part.to(tl.int64) * _N_COLUMNS
    begin = (program - tl.load(row + _FIRST_TILE)) * BLOCK  # int64, as all that is loaded from the table
    left = tl.minimum(tl.load(row + _SIZE) - begin, BLOCK).to(tl.int32)
    w_at = tl.load(row + _WEIGHT).to(tl.pointer_type(weight.dtype.element_ty)) + begin
    g_at = tl.load(grads + part).to(tl.pointer_type(grad.dtype.element_ty)) + begin
    m_at = tl.load(row + _EXP_AVG).to(tl.pointer_type(moment.dtype.element_ty))
    v_at = tl.load(row + _EXP_AVG_SQ).to(tl.pointer_type(moment.dtype.element_ty))
    t_at = tl.load(row + _STEPS).to(tl.pointer_type(tl.float32))
    if ALIGNED:
        w_at, g_at = tl.multiple_of(w_at, 16), tl.multiple_of(g_at, 16)
        m_at, v_at = tl.multiple_of(m_at, 16), tl.multiple_of(v_at, 16)
        left = tl.multiple_of(left, 16)
    kind, number, first_moment = tl.load(row + _KIND), tl.load(row + _NUMBER), tl.load(row + _FIRST_MOMENT)
    at = tl.arange(0, BLOCK)
    inside = at < left
    if ON_DEVICE:
        lr, lr_free, kept = _number(lr), _number(lr_free), _number(kept)
    w = tl.load(w_at + at, mask=inside, other=0.0).to(tl.float32) * kept
    g = tl.load(g_at + at, mask=inside, other=0.0).to(tl.float32)
    if kind == _FREE:
        w = _state_free(w, g, lr_free, RULE_FREE)
    elif kind == _FULL:
        w = _state_full(
            w, g, m_at, v_at, begin + at, inside, tl.load(t_at), lr, beta1, beta2, rest1, rest2, log1, log2, eps,
            key, number, first_moment, RULE, STOCHASTIC,
        )  # fmt: skip
    else:
        long, width = tl.load(row + _LENGTH), tl.load(row + _WIDTH).to(tl.int32)  # of a row of W, and of its moments
        entry, length = (begin % long).to(tl.uint32) + at.to(tl.uint32), long.to(tl.uint32)  # from the tile's first row
        r, c = (begin // long).to(tl.int32) + (entry // length).to(tl.int32), (entry % length).to(tl.int32)
        slots = tl.load(row + _SLOTS).to(tl.pointer_type(tl.int32))  # of each line: its place among the selected, or −1
        slot = tl.load(slots + tl.where(kind == _ROWS, r, c), mask=inside, other=-1)
        selected = slot >= 0
        place = tl.where(kind == _ROWS, slot, r).to(tl.int64) * width + tl.where(kind == _ROWS, c, slot)
        t = tl.load(t_at + slot, mask=selected, other=1.0) if OWN_STEPS else tl.load(t_at)
        full = _state_full(
            w, g, m_at, v_at, place, selected, t, lr, beta1, beta2, rest1, rest2, log1, log2, eps,
            key, number, first_moment, RULE, STOCHASTIC,
        )  # fmt: skip
        w = tl.where(selected, full, _state_free(w, g, lr_free, RULE_FREE))
    _store(w_at, at, w, inside, key, number, 0, tl.load(row + _FIRST_WEIGHT) + begin, STOCHASTIC)


@triton.jit
def close(weights, rest, moved, tiles, size, lr, kept, RULE: tl.constexpr, BLOCK: tl.constexpr):
    """Update a tile of a matrix whose gradient is projected: `W ← W·kept`, then `STATE_FREE[RULE]` on the rest, `+ PN`.

    Args:
        weights: int64 [b], pointers to matrices W of float32.
        rest, moved: float32 [b, size]: the part G − PR of the gradients outside the subspace, which rule "none" does
            not read, and the updates PN by the state-full rule.
        tiles, size: tiles and entries of a matrix.
    """
    matrix, tile = tl.program_id(0) // tiles, tl.program_id(0) % tiles
    at = tile.to(tl.int64) * BLOCK + tl.arange(0, BLOCK)
    inside, here = at < size, matrix.to(tl.int64) * size + at
    w_at = tl.load(weights + matrix).to(tl.pointer_type(tl.float32)) + at
    w = tl.load(w_at, mask=inside, other=0.0) * kept
    if RULE != "none":
        w = _state_free(w, tl.load(rest + here, mask=inside, other=0.0), lr, RULE)
    tl.store(w_at, w + tl.load(moved + here, mask=inside, other=0.0), mask=inside)


@triton.jit
def _number(rate):
    return tl.load(rate).to(tl.float32)


@triton.jit
def _state_free(w, g, lr, RULE: tl.constexpr):
    """Return new weights, by the rules of `state_free`."""
    if RULE == "signsgd":
        w -= lr * _sign(g)
    elif RULE == "sgd":
        w -= lr * g
    else:
        tl.static_assert(RULE == "none")
    return w


@triton.jit
def _state_full(
    w, g, m_at, v_at, place, mask, t, lr, beta1, beta2, rest1, rest2, log1, log2, eps, key, number, first,
    RULE: tl.constexpr, STOCHASTIC: tl.constexpr,
):  # fmt: skip
    """Return new weights, and update their moments at `place`: `rules.adamw_`, `lion_`, `sgdm_`.

    `t` is the step count, one for all or one for each entry.
    """
    m = tl.load(m_at + place, mask=mask, other=0.0).to(tl.float32)
    v = tl.load(v_at + place, mask=mask, other=0.0).to(tl.float32) if RULE == "adamw" else m
    w, m, v = _updated(w, g, m, v, t, lr, beta1, beta2, rest1, rest2, log1, log2, eps, RULE)
    if RULE == "adamw":
        _store(v_at, place, v, mask, key, number, 2, first, STOCHASTIC)
    _store(m_at, place, m, mask, key, number, 1, first, STOCHASTIC)
    return w


@triton.jit
def _updated(w, g, m, v, t, lr, beta1, beta2, rest1, rest2, log1, log2, eps, RULE: tl.constexpr):
    """Return new weights and moments; only "adamw" has v."""
    if RULE == "adamw":
        m += rest1 * (g - m)
        v = beta2 * v + rest2 * g * g
        w -= (lr / _bias(t, log1)) * m / (tl.sqrt(v) / tl.sqrt(_bias(t, log2)) + eps)
    elif RULE == "lion":
        w -= lr * _sign(m + rest1 * (g - m))
        m += rest2 * (g - m)
    else:
        tl.static_assert(RULE == "sgdm")
        m = beta1 * m + g
        w -= lr * m
    return w, m, v


@triton.jit
def _bias(t, log):
    """Return 1 − βᵗ, where βᵗ is near 1 by its series: float32 would lose digits."""
    x = t * log
    series = -x * (1 + x / 2 * (1 + x / 3 * (1 + x / 4 * (1 + x / 5 * (1 + x / 6)))))
    return tl.where(x > -0.125, series, 1 - tl.exp(x))


@triton.jit
def _sign(x):
    return tl.where(x > 0, 1.0, tl.where(x < 0, -1.0, x))  # NaN for NaN


@triton.jit
def _store(pointer, place, value, mask, key, number, ROLE: tl.constexpr, first, STOCHASTIC: tl.constexpr):
    """Store float32 values in the pointer's dtype: `rounding.Rounding.store`."""
    if pointer.dtype.element_ty == tl.bfloat16:
        bits = value.to(tl.uint32, bitcast=True)
        if STOCHASTIC:
            added = _noise(key, number, ROLE, first + place)
        else:
            added = 0x7FFF + ((bits >> 16) & 1)  # to the nearest, halves to even
        is_finite = (bits & 0x7F800000) != 0x7F800000
        value = tl.where(is_finite, (bits + added) & 0xFFFF0000, bits).to(tl.float32, bitcast=True)
    tl.store(pointer + place, value.to(pointer.dtype.element_ty), mask=mask)


@triton.jit
def _noise(key, number, ROLE: tl.constexpr, entry):
    """Return 16 random bits for each entry, uint32: `rounding.noise`."""
    start = _mix(_mix(key.to(tl.uint32) + number.to(tl.uint32)) + ROLE)
    high = _mix(start + (entry >> 32).to(tl.uint32))
    return _mix(high ^ entry.to(tl.uint32)) >> 16


@triton.jit
def _mix(x):
    x = (x ^ (x >> 16)) * 0x7FEB352D
    x = (x ^ (x >> 15)) * 0x846CA68B
    return x ^ (x >> 16)


# -- moments in 8 bits ------------------------------------------------------------------------------------------------


@triton.jit(do_not_specialize=["key"])
def step_codes(
    owners, table, grads, weight, grad, moment, lr, lr_free, kept, beta1, beta2, rest1, rest2, log1, log2, eps, key,
    RULE: tl.constexpr, RULE_FREE: tl.constexpr, OWN_STEPS: tl.constexpr, STOCHASTIC: tl.constexpr,
    ON_DEVICE: tl.constexpr, ALIGNED: tl.constexpr, BLOCK: tl.constexpr, RUN: tl.constexpr,
):  # fmt: skip
    """Update a tile as `step` does, where moments are codes: a tile is groups of entries of a row that share a scale.

    A part is rows of `length` entries, with moments of `width`; one without moments is one row. The arguments are those
    of `step`. Codes are always rounded stochastically; STOCHASTIC is of weights.
    """
    program = tl.program_id(0)
    part = tl.load(owners + program // RUN)
    row = table + part.to(tl.int64) * _N_COLUMNS
    w_at = tl.load(row + _WEIGHT).to(tl.pointer_type(weight.dtype.element_ty))
    g_at = tl.load(grads + part).to(tl.pointer_type(grad.dtype.element_ty))
    t_at = tl.load(row + _STEPS).to(tl.pointer_type(tl.float32))
    slots = tl.load(row + _SLOTS).to(tl.pointer_type(tl.int32))
    long, width, kind = tl.load(row + _LENGTH), tl.load(row + _WIDTH), tl.load(row + _KIND)
    if ALIGNED:
        w_at, g_at = tl.multiple_of(w_at, 16), tl.multiple_of(g_at, 16)
        long, width = tl.multiple_of(long, 16), tl.multiple_of(width, 16)
    if ON_DEVICE:
        lr, lr_free, kept = _number(lr), _number(lr_free), _number(kept)
    some: tl.constexpr = BLOCK // _GROUP
    group = (program - tl.load(row + _FIRST_TILE)).to(tl.int32) * some + tl.arange(0, some)[:, None]
    blocks = ((width + _GROUP - 1) // _GROUP).to(tl.int32)  # groups of a row of moments
    r, of_row = (group // blocks).to(tl.int64), group % blocks
    begin, lane = of_row.to(tl.int64) * _GROUP, tl.arange(0, _GROUP)[None, :]
    here, column = r * long < tl.load(row + _SIZE), begin + lane
    inside = here & (lane < width - begin)
    if kind == _SELECTED_COLUMNS:
        each = (((long + blocks - 1) // blocks + 31) // 32 * 32).to(tl.int32)  # entries of W for each group of its row
        for start in range(0, each, _GROUP):
            c = of_row * each + start + lane
            free = here & (start + lane < each) & (c < long)
            free &= tl.load(slots + c, mask=free, other=0) < 0  # a program of another group updates the others
            w, g = _loaded(w_at, g_at, r * long + c, free, kept)
            _store_weight(w_at, r * long + c, _state_free(w, g, lr_free, RULE_FREE), free, row, key, STOCHASTIC)
        at = r * long + tl.load(slots + long + column, mask=inside, other=0)
        w, g = _loaded(w_at, g_at, at, inside, kept)
        t = tl.load(t_at + column, mask=inside, other=1.0) if OWN_STEPS else tl.load(t_at)
        w = _state_full_codes(
            row, w, g, r * width + column, group, inside, here, t, lr, beta1, beta2, rest1, rest2, log1, log2, eps, key,
            RULE, ALIGNED,
        )  # fmt: skip
        _store_weight(w_at, at, w, inside, row, key, STOCHASTIC)
    else:
        w, g = _loaded(w_at, g_at, r * long + column, inside, kept)
        free, slot = _state_free(w, g, lr_free, RULE_FREE), tl.where(kind == _FREE, -1, r)
        if kind == _ROWS:
            slot = tl.load(slots + r, mask=here, other=-1).to(tl.int64)
        if tl.max(slot) >= 0:
            has, own = here & (slot >= 0), tl.where(kind == _ROWS, slot, 0)
            t = tl.load(t_at + own, mask=has, other=1.0) if OWN_STEPS else tl.load(t_at)
            w = _state_full_codes(
                row, w, g, slot * width + column, slot * blocks + of_row, inside & has, has, t, lr, beta1, beta2, rest1,
                rest2, log1, log2, eps, key, RULE, ALIGNED,
            )  # fmt: skip
            free = tl.where(has, w, free)
        _store_weight(w_at, r * long + column, free, inside, row, key, STOCHASTIC)


@triton.jit
def _loaded(w_at, g_at, at, mask, kept):
    """Return weights after decay, and gradients, float32; 0 beyond `mask`."""
    w = tl.load(w_at + at, mask=mask, other=0.0).to(tl.float32) * kept
    return w, tl.load(g_at + at, mask=mask, other=0.0).to(tl.float32)


@triton.jit
def _store_weight(w_at, at, w, mask, row, key, STOCHASTIC: tl.constexpr):
    _store(w_at, at, w, mask, key, tl.load(row + _NUMBER), 0, tl.load(row + _FIRST_WEIGHT), STOCHASTIC)


@triton.jit
def _state_full_codes(
    row, w, g, place, group, mask, has, t, lr, beta1, beta2, rest1, rest2, log1, log2, eps, key,
    RULE: tl.constexpr, ALIGNED: tl.constexpr,
):  # fmt: skip
    """Return new weights, and update their moments: codes at `place`, scales at `group`, one for each row of the tile.

    `has` is whether there is such a group; entries beyond `mask` have g = 0.
    """
    number, first = tl.load(row + _NUMBER), tl.load(row + _FIRST_MOMENT)
    m_at = tl.load(row + _EXP_AVG).to(tl.pointer_type(tl.int8))
    v_at = tl.load(row + _EXP_AVG_SQ).to(tl.pointer_type(tl.uint8))
    m_scale = tl.load(row + _SCALE).to(tl.pointer_type(tl.float32)) + group
    v_scale = tl.load(row + _SCALE_SQ).to(tl.pointer_type(tl.float32)) + group
    if ALIGNED:
        m_at, v_at = tl.multiple_of(m_at, 16), tl.multiple_of(v_at, 16)
    m = _decode(m_at + place, m_scale, mask, has, 127.0)
    v = _decode(v_at + place, v_scale, mask, has, 255.0) if RULE == "adamw" else m
    w, m, v = _updated(w, g, m, v, t, lr, beta1, beta2, rest1, rest2, log1, log2, eps, RULE)
    if RULE == "adamw":
        code = _encode(v, v_scale, has, _noise(key, number, 2, first + place), 255.0)
        code = tl.where(v > 0, tl.maximum(code, 1.0), code)
        tl.store(v_at + place, code.to(tl.int32).to(tl.uint8), mask=mask)
    code = _encode(m, m_scale, has, _noise(key, number, 1, first + place), 127.0)
    tl.store(m_at + place, tl.where(m < 0, -code, code).to(tl.int32).to(tl.int8), mask=mask)
    return w


@triton.jit
def _decode(code_at, scale_at, mask, has, most: tl.constexpr):
    """Return float32 values of codes: `eight_bits.decode`."""
    code = tl.load(code_at, mask=mask, other=0).to(tl.float32)
    size = _fourth_power(code) * (1 / most**4) * tl.load(scale_at, mask=has, other=0.0)
    return tl.where(code < 0, -size, size)


@triton.jit
def _encode(value, scale_at, has, noise, most: tl.constexpr):
    """Return codes without their signs, float32, and store the scales: `eight_bits.encode`, without its divisions."""
    bits = value.to(tl.int32, bitcast=True) & 0x7FFFFFFF
    scale = tl.max(bits, 1, keep_dims=True).to(tl.float32, bitcast=True)  # of these integers NaN is the largest
    tl.store(scale_at, scale, mask=has)
    power = bits.to(tl.float32, bitcast=True) / tl.where(scale == 0, 1.0, scale) * most**4  # of the code
    below = tl.minimum(tl.floor(tl.sqrt(tl.sqrt(power))), most - 1)
    low = _fourth_power(below)
    is_above = (power - low) * 65536 > noise.to(tl.float32) * (_fourth_power(below + 1) - low)
    return tl.where(power == power, below + tl.where(is_above, 1.0, 0.0), 0.0)


@triton.jit
def _fourth_power(x):
    return (x * x) * (x * x)
