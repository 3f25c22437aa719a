"""Advance PyTorch's CPU generator by any number of draws, in milliseconds.

A recording has to leave the generator where eager construction would have left it, and one parameter alone has to get
the values it would have had after all the others. Drawing seven billion numbers to get there takes a minute. But
MT19937 is linear over GF(2): with ``p`` the characteristic polynomial of its word sequence ``w`` and
``g = x**n mod p``, ``w[i + n]`` is the XOR of those ``w[i + k]`` for which ``g`` has the term ``x**k`` (Haramoto,
Matsumoto, Nishimura, Panneton, L'Ecuyer: "Efficient Jump Ahead for F2-Linear Random Number Generators", 2008).
Polynomials are Python integers here, one bit a coefficient. Squaring spreads the bits. Dividing by ``p`` takes shifts
alone: it has 135 terms, and the two highest are 623 apart, so that ``p**32``, which is ``p(x**32)``, has nothing but
its highest term in what matters of a quotient, and ``1/p`` is there ``p**31``, the product of ``p(x)``, ``p(x**2)``,
``p(x**4)``, ``p(x**8)`` and ``p(x**16)``. About 15 ms for 1e10 draws, and no more for 1e12.

The state is the one of ``torch.Generator.get_state``: seed (8 bytes), left (4), seeded (4), next (8), 624 words (8
each), then the cached normal samples, which draws of whole words do not touch.
"""

from __future__ import annotations

from functools import lru_cache

import torch

NUM_WORDS = 624
_DEGREE = 19937
_NEXT = slice(16, 24)
_LEFT = slice(8, 12)
_WORDS = slice(24, 24 + 8 * NUM_WORDS)
_MANY_DRAWS = 1 << 23  # from here on a jump is quicker than drawing
_CHUNK = 1 << 18
_ROWS = 32  # XORed at a time: in the cache, and too few for threads, which on a busy machine wait for each other

# Exponents of p below its degree, found with the Berlekamp-Massey algorithm; tests/deferred/test_mersenne.py
# compares jumps with draws.
# fmt: off
_EXPONENTS = (
    0, 1189, 1416, 1585, 1643, 1870, 2493, 2773, 3000, 3227, 3454, 3681, 3908, 4135, 4362, 4753, 5661, 6337, 6569,
    7129, 7477, 7525, 7583, 7752, 7979, 8206, 9505, 9901, 9969, 10128, 10693, 10761, 10920, 11089, 11147, 11157,
    11215, 11321, 11374, 11384, 11485, 11611, 11712, 11717, 11838, 11881, 11944, 11997, 12277, 12335, 12393, 12504,
    12509, 12620, 12673, 12731, 12736, 12789, 12905, 12958, 12963, 13137, 13185, 13190, 13243, 13301, 13412, 13528,
    13533, 13639, 13697, 13760, 13813, 13866, 14093, 14151, 14209, 14320, 14325, 14436, 14547, 14552, 14605, 14721,
    14774, 14779, 14953, 15001, 15006, 15059, 15117, 15228, 15344, 15349, 15455, 15513, 15576, 15629, 15682, 15909,
    15967, 16025, 16136, 16141, 16252, 16363, 16368, 16421, 16537, 16590, 16595, 16817, 16822, 16875, 16933, 17044,
    17160, 17271, 17329, 17445, 17498, 17725, 17783, 17841, 17952, 18068, 18179, 18237, 18406, 18633, 18691, 18860,
    19087, 19314,
)
# fmt: on
_BELOW = tuple(_DEGREE - exponent for exponent in (*_EXPONENTS, _DEGREE))  # how far each term is from the highest
_SHIFTS = tuple(tuple(power * below for below in _BELOW if power * below < _DEGREE) for power in (16, 8, 4, 2, 1))
_GAPS = tuple(high - low for low, high in zip(_EXPONENTS, (*_EXPONENTS[1:], _DEGREE), strict=True))[::-1]


def advance(generator: torch.Generator, num_draws: int) -> None:
    """Move a CPU generator on by ``num_draws`` 32-bit draws, exactly as if they had been made."""
    with torch._C.DisableTorchFunction():  # modes that watch construction are slow, and have nothing to see here
        if num_draws >= _MANY_DRAWS:
            _jump(generator, num_draws)
        else:
            _draw(generator, num_draws)


def _draw(generator: torch.Generator, num_draws: int) -> None:
    scratch = torch.empty(min(num_draws, _CHUNK), dtype=torch.float32, device="cpu")
    for start in range(0, num_draws, _CHUNK):
        scratch[: num_draws - start].uniform_(generator=generator)


def _jump(generator: torch.Generator, num_draws: int) -> None:
    consumed = _consumed(generator.get_state())
    _draw(generator, NUM_WORDS - consumed + 1)  # into a fresh block: the words of a seed need not obey the recurrence
    target = consumed + num_draws  # in draws since the start of the block we came from
    blocks, last = divmod(target - 1, NUM_WORDS)
    words = _words_ahead(generator)
    state = generator.get_state()
    ahead = _evaluate(_power(NUM_WORDS * (blocks - 1)), words)
    state[_WORDS].view(torch.int64).copy_(ahead)
    state[_NEXT].view(torch.int64).fill_(last + 1)
    state[_LEFT].view(torch.int32).fill_(NUM_WORDS - last)
    generator.set_state(state)


def _consumed(state: torch.Tensor) -> int:
    """How many words of the present block are used up; a fresh seed counts as a block used up."""
    left = int(state[_LEFT].view(torch.int32).item())
    return NUM_WORDS - left + 1


def _words_ahead(generator: torch.Generator) -> torch.Tensor:
    """The raw words of this block and the next ones, as many as a polynomial reaches: int64 of 0 to 2**32 - 1."""
    blocks = []
    for _ in range(_DEGREE // NUM_WORDS + 2):
        blocks.append(generator.get_state()[_WORDS].view(torch.int64).clone())
        _draw(generator, NUM_WORDS)
    return torch.cat(blocks)


def _evaluate(polynomial: int, words: torch.Tensor) -> torch.Tensor:
    """XOR of ``words[k : k + 624]`` over the terms ``x**k``."""
    windows = words.to(torch.int32).unfold(0, NUM_WORDS, 1)
    total = torch.zeros(_ROWS, NUM_WORDS, dtype=torch.int32, device="cpu")
    for terms in _terms(polynomial).split(_ROWS):
        # by index_select: windows[...] gathers element by element, and takes a hundred times as long
        rows = windows.index_select(0, terms)
        total[: len(rows)] ^= rows
    while len(total) > 1:
        total = total[: len(total) // 2] ^ total[len(total) // 2 :]
    return total[0].to(torch.int64) & 0xFFFFFFFF


def _terms(polynomial: int) -> torch.Tensor:
    """The exponents of its terms, int64."""
    bits = torch.frombuffer(bytearray(polynomial.to_bytes(_DEGREE // 8 + 1, "little")), dtype=torch.uint8)
    places = torch.arange(8, dtype=torch.uint8, device="cpu")
    return (bits.unsqueeze(1) >> places & 1).view(-1).nonzero().view(-1)


@lru_cache(maxsize=256)
def _power(exponent: int) -> int:
    """``x**exponent mod p``."""
    low_bits = max(exponent.bit_length() - 14, 0)  # 2**14 < the degree: nothing to reduce yet
    power = 1 << (exponent >> low_bits)
    for bit in range(low_bits - 1, -1, -1):
        power = _reduce(_square(power) << (exponent >> bit & 1))
    return power


def _square(polynomial: int) -> int:
    """Over GF(2) squaring puts a zero between any two coefficients: binary digits read in base four."""
    return int(f"{polynomial:b}", 4)


def _reduce(polynomial: int) -> int:
    while high := polynomial >> _DEGREE:
        quotient = _quotient(high)
        product = 0  # of the quotient and p, by Horner's rule
        for gap in _GAPS:
            product = (product ^ quotient) << gap
        polynomial ^= product ^ quotient
    return polynomial


def _quotient(high: int) -> int:
    """``high * x**19937`` by ``p``; of more than 19936 terms the last may be wrong."""
    for shifts in _SHIFTS:
        product = 0
        for shift in shifts:
            product ^= high >> shift
        high = product
    return high
