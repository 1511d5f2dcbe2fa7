"""The grammar against a second, slower description of the same language, and the promises it makes.

The description (`sequence`, `content`, `segment`, `plan_parts`) is written as generators that yield the set of ids
that may come next and are sent the id that came. Walks are random over random token spaces. That `min_remaining`
is exact follows by induction from the two local facts that `test_budget_is_exact_at_every_state` checks.
"""

import math
import random
from collections.abc import Generator, Iterator
from itertools import pairwise

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from anytoken.grammar import (
    Grammar,
    State,
)
from anytoken.token_space import TokenSpace
from anytoken.tokenizers.base import CodeGrid, Codes, CodeSequence, CodeShape, codebook_pattern
from anytoken.utils.errors import TokenSpaceError

Walk = Generator[set[int], int, int]
SEEDS = st.integers(0, 2**32 - 1)
FEW = settings(max_examples=60, deadline=None)


def random_shape(chance: random.Random) -> CodeShape:
    books = chance.choice([1, 1, 2, 3])
    order = chance.choice(["flatten", "delay"])
    if chance.random() < 0.5:
        low = chance.randint(1, 3)
        return CodeSequence(low, low + chance.randint(0, 3), books, order, chance.choice([0, 0, 1, 3]))
    axes = chance.randint(1, 3)
    low_size = tuple(chance.randint(1, 2) for _ in range(axes))
    high_size = tuple(n + chance.randint(0, 2) for n in low_size)
    return CodeGrid(tuple("abc"[:axes]), low_size, high_size, books, order, chance.choice([0, 0, 1, 3]))


def random_space(chance: random.Random) -> TokenSpace:
    space = TokenSpace(chance.randint(1, 3), 4)
    for name in ["image", "tone", "film"][: chance.randint(0, 3)]:
        shape = random_shape(chance)
        sizes = [chance.randint(1, 3) for _ in range(shape.num_codebooks)]
        space.append_modality(name, sizes, shape, chance.randint(1, 3) if shape.num_global_codes else 0)
    return space


def random_plan(chance: random.Random, space: TokenSpace) -> tuple[str, ...] | None:
    plan: list[str] = []
    for kind in chance.choices(space.modality_names, k=chance.randint(0, 4)):
        if (kind, plan[-1:]) != ("text", ["text"]):
            plan.append(kind)
    return tuple(plan) or None


def random_pins(chance: random.Random, space: TokenSpace) -> dict[str, tuple[int, ...]]:
    return {
        name: tuple(
            chance.randint(low, high) for low, high in zip(shape.min_size, shape.max_size, strict=True)
        )
        for name, shape in space.shapes.items()
        if isinstance(shape, CodeGrid) and chance.random() < 0.3
    }


# ---- the second description ----


class Language:
    """What may come next, as generators over sets of ids."""

    def __init__(self, space: TokenSpace, pins: dict[str, tuple[int, ...]] | None = None) -> None:
        self.space, self.pins = space, pins or {}
        self.text = set(range(space.text_size))
        self.opens = {space.open_token(name): name for name in space.modalities}

    def segment(self, name: str) -> Walk:
        """From after the open id to the close id."""
        space, shape = self.space, self.space.shapes[name]
        books = [set(range(space.text_size, space.vocab_size)) for _ in range(shape.num_codebooks)]
        for number, book in enumerate(books):
            book &= {
                i for i in range(space.vocab_size) if space.range_of(i) == space.code_range(name, number)
            }
        close = space.close_token(name)
        if isinstance(shape, CodeGrid):
            cells = 1
            for axis in range(len(shape.axes)):
                pin = self.pins.get(name)
                numbers = [pin[axis]] if pin else range(shape.min_size[axis], shape.max_size[axis] + 1)
                sizes = {space.size_token(n): n for n in numbers}
                cells *= sizes[(yield set(sizes))]
            yield from self.global_codes(name)
            if shape.order == "delay":
                return (yield from self.delayed(books, close, cells, cells))
            for _ in range(cells):
                for book in books:
                    yield book
            return (yield {close})
        yield from self.global_codes(name)
        if shape.order == "delay":
            return (yield from self.delayed(books, close, shape.min_length, shape.max_length))
        frames = 0
        while True:
            choices = books[0] if frames < shape.max_length else set()
            token = yield choices | ({close} if frames >= shape.min_length else set())
            if token == close:
                return token
            for book in books[1:]:
                yield book
            frames += 1

    def global_codes(self, name: str) -> Generator[set[int], int, None]:
        """All of one set, before the local codes."""
        for _ in range(self.space.shapes[name].num_global_codes):
            yield {i for i in range(self.space.vocab_size) if self.space.range_of(i).name == f"{name}.global"}

    def delayed(self, books: list[set[int]], close: int, low: int, high: int) -> Walk:
        """In step s stand codebook q of frame s - q, as far as there are such frames."""
        begun, ended, step = 0, False, 0
        while True:
            waiting = [q for q in range(1, len(books)) if 0 <= step - q < begun]
            first = books[0] if not ended and begun < high else set()
            rest = set() if begun < low else (books[waiting[0]] if waiting else {close})
            token = yield first | rest
            if token == close:
                return token
            if token in first:
                begun += 1
                waiting = [q for q in range(1, len(books)) if 0 <= step - q < begun]
            else:
                ended, waiting = True, waiting[1:]
            for q in waiting:
                yield books[q]
            step += 1

    def content(self, role: str) -> Walk:
        space, begun = self.space, False
        while True:
            extra = {space.end} if begun else {space.null} if role == "user" else set()
            token = yield self.text | set(self.opens) | extra
            if token == space.null:
                return (yield {space.end})
            if token == space.end:
                return token
            if token in self.opens:
                yield from self.segment(self.opens[token])
            begun = True

    def sequence(self) -> Walk:
        space = self.space
        yield {space.bos}
        roles = {space.system: "system", space.user: "user", space.assistant: "assistant"}
        while True:
            yield from self.content(roles[(yield set(roles))])

    def plan_parts(self, plan: tuple[str, ...]) -> Walk:
        first = [self.text if kind == "text" else {self.space.open_token(kind)} for kind in plan]
        first.append({self.space.end})
        token = yield first[0]
        for number, kind in enumerate(plan):
            if kind == "text":
                while token in self.text:
                    token = yield self.text | first[number + 1]
            else:
                yield from self.segment(kind)
                token = yield first[number + 1]
        return token

    def reply(self, plan: tuple[str, ...] | None) -> Walk:
        return self.content("assistant") if plan is None else self.plan_parts(plan)


def members(ranges: tuple[tuple[int, int], ...]) -> set[int]:
    return {token for start, stop in ranges for token in range(start, stop)}


def assert_tidy(ranges: tuple[tuple[int, int], ...]) -> None:
    """Sorted, merged, half-open, none empty."""
    edges = [edge for span in ranges for edge in span]
    assert all(before < after for before, after in pairwise(edges))


def random_states(grammar: Grammar, state: State, chance: random.Random, steps: int) -> Iterator[State]:
    """States of a random walk without a budget."""
    for _ in range(steps):
        yield state
        choices = sorted(members(grammar.allowed(state)))
        if not choices:
            return
        state = grammar.advance(state, chance.choice(choices))


def draw_case(seed: int) -> tuple[random.Random, Grammar, tuple[str, ...] | None, dict[str, tuple[int, ...]]]:
    chance = random.Random(seed)
    space = random_space(chance)
    return chance, Grammar(space), random_plan(chance, space), random_pins(chance, space)


# ---- properties ----


def assert_follows(grammar: Grammar, state: State, walk: Walk, chance: random.Random, steps: int) -> None:
    """At every state of a random walk `allowed` is the description's set, and `advance` takes exactly those ids."""
    expected = next(walk)
    for _ in range(steps):
        assert_tidy(grammar.allowed(state))
        assert members(grammar.allowed(state)) == expected != set()
        for token in range(-1, grammar.vocab_size + 2):
            if token not in expected:
                with pytest.raises(TokenSpaceError):
                    grammar.advance(state, token)
        nexts = {token: grammar.advance(state, token) for token in expected}
        token = chance.choice(sorted(expected))
        state = nexts[token]
        try:
            expected = walk.send(token)
        except StopIteration:
            assert grammar.finished(state) and grammar.allowed(state) == ()
            return


@given(SEEDS)
@FEW
def test_conversations_follow_the_description(seed: int) -> None:
    chance, grammar, _, _ = draw_case(seed)
    assert_follows(grammar, grammar.start(), Language(grammar.token_space).sequence(), chance, 40)


@given(SEEDS)
@FEW
def test_replies_follow_the_description(seed: int) -> None:
    chance, grammar, plan, pins = draw_case(seed)
    walk = Language(grammar.token_space, pins).reply(plan)
    assert_follows(grammar, grammar.reply(plan, pins), walk, chance, 40)


@given(SEEDS)
@FEW
def test_budget_is_exact_at_every_state(seed: int) -> None:
    """min_remaining is one more than the best next state's, and a budget offers exactly the ids that fit it."""
    chance, grammar, plan, pins = draw_case(seed)
    for begin in (grammar.start(), grammar.reply(plan, pins)):
        for state in random_states(grammar, begin, chance, 25):
            least = grammar.min_remaining(state)
            needs = {
                token: 1 + grammar.min_remaining(grammar.advance(state, token))
                for token in members(grammar.allowed(state))
            }
            assert least == (0 if grammar.finished(state) else min(needs.values()))
            with pytest.raises(TokenSpaceError, match=f"{least - 1} ids are left.*takes {least}"):
                grammar.allowed(state, least - 1)
            for budget in range(least, max([least, *needs.values()]) + 3):
                assert_tidy(grammar.allowed(state, budget))
                fits = {token for token, need in needs.items() if need <= budget}
                assert members(grammar.allowed(state, budget)) == fits
                assert fits or grammar.finished(state)


@given(SEEDS, st.integers(0, 60))
@FEW
def test_any_budget_ends_in_a_legal_reply_within_it(seed: int, spare: int) -> None:
    chance, grammar, plan, pins = draw_case(seed)
    state = grammar.reply(plan, pins)
    budget = grammar.min_remaining(state) + spare
    ids: list[int] = []
    while not grammar.finished(state):
        ids.append(chance.choice(sorted(members(grammar.allowed(state, budget - len(ids))))))
        state = grammar.advance(state, ids[-1])
    assert len(ids) <= budget
    pieces = grammar.parse(ids)
    assert pieces and (plan is None or tuple(piece.kind for piece in pieces) == plan)
    space = grammar.token_space
    grammar.validate([space.bos, space.user, space.null, space.end, space.assistant, *ids])
    for piece in pieces:
        if piece.kind in pins:
            assert piece.size == pins[piece.kind]


@given(SEEDS)
@FEW
def test_conversations_parse_and_can_be_written_again(seed: int) -> None:
    """Pieces hold everything: written by hand from the description's format they give the same ids."""
    chance, grammar, _, _ = draw_case(seed)
    space, state, ids = grammar.token_space, grammar.start(), []
    while not (grammar.finished(state) and len(ids) >= 30):
        budget = None if len(ids) < 30 else grammar.min_remaining(state)
        ids.append(chance.choice(sorted(members(grammar.allowed(state, budget)))))
        state = grammar.advance(state, ids[-1])
    grammar.validate(ids)
    written = []
    for piece in grammar.parse(ids):
        if piece.kind == "text":
            assert piece.values.ndim == 1 and piece.values.dtype == np.int64 and len(piece.values)
            written += piece.values.tolist()
            continue
        shape, starts = space.shapes[piece.kind], [span.start for span in space.ranges if span.kind == "code"]
        assert piece.values.shape[1] == shape.num_codebooks and piece.role in ("system", "user", "assistant")
        frames = math.prod(piece.size) if isinstance(shape, CodeGrid) else len(piece.values)
        assert len(piece.values) == frames
        written += [space.open_token(piece.kind), *(space.size_token(n) for n in piece.size)]
        assert len(piece.header) == shape.num_global_codes
        for code in piece.header.tolist():
            assert 0 <= code < space.global_codebook_size(piece.kind)
            written.append(space.global_range(piece.kind).start + code)
        for place in codebook_pattern(shape, frames).tolist():
            frame, book = divmod(place, shape.num_codebooks)
            code, span = int(piece.values[frame, book]), space.code_range(piece.kind, book)
            assert span.start in starts and 0 <= code < len(span)
            written.append(span.start + code)
        written.append(space.close_token(piece.kind))
    frame_ids = {space.bos, space.system, space.user, space.assistant, space.end, space.null}
    assert written == [token for token in ids if token not in frame_ids]


@given(SEEDS)
@FEW
def test_loss_classes_hold_what_is_allowed(seed: int) -> None:
    """Where an id may stand, its class holds every id that may stand there; classes share no id and cover all."""
    chance, grammar, plan, pins = draw_case(seed)
    classes = [members(ranges) for ranges in grammar.class_ranges]
    assert sorted(token for one in classes for token in one) == list(range(grammar.vocab_size))
    rows = grammar.loss_rows(torch.arange(grammar.vocab_size))
    assert all(token in classes[row] for token, row in enumerate(rows.tolist()))
    for begin in (grammar.start(), grammar.reply(plan, pins)):
        for state in random_states(grammar, begin, chance, 30):
            allowed = members(grammar.allowed(state))
            for token in allowed:
                assert allowed <= classes[rows[token]]


# ---- a small space, by hand ----


@pytest.fixture(scope="module")
def grammar() -> Grammar:
    space = TokenSpace(10, 16)
    space.append_modality("image", [20], CodeGrid(("rows", "cols"), (1, 1), (16, 16)))
    space.append_modality("tone", [7, 5], CodeSequence(2, 5, num_codebooks=2))
    return Grammar(space)


def image_ids(space: TokenSpace, rows: int, cols: int) -> list[int]:
    code = space.code_range("image").start
    sizes = [space.size_token(rows), space.size_token(cols)]
    return [space.open_token("image"), *sizes, *[code] * (rows * cols), space.close_token("image")]


def test_a_segment_that_does_not_fit_is_not_started(grammar: Grammar) -> None:
    space, state = grammar.token_space, grammar.reply()
    assert grammar.min_remaining(state) == 2
    opens = {"image": 6, "tone": 7}  # open, sizes, codes, close, and the end id of the turn
    for name, least in opens.items():
        assert space.open_token(name) not in members(grammar.allowed(state, least - 1))
        assert space.open_token(name) in members(grammar.allowed(state, least))


def test_a_grid_is_limited_to_what_fits(grammar: Grammar) -> None:
    space = grammar.token_space
    state = grammar.walk(grammar.reply(("image",)), [space.open_token("image")])
    assert members(grammar.allowed(state, 2 + 6 + 2)) == {space.size_token(n) for n in range(1, 7)}
    state = grammar.advance(state, space.size_token(3))
    assert members(grammar.allowed(state, 1 + 6 + 2)) == {space.size_token(1), space.size_token(2)}
    assert members(grammar.allowed(state)) == {space.size_token(n) for n in range(1, 17)}


def test_close_ids_come_only_where_a_segment_may_end(grammar: Grammar) -> None:
    space = grammar.token_space
    first, second = (space.code_range("tone", book).start for book in (0, 1))
    state, seen = grammar.walk(grammar.reply(("tone",)), [space.open_token("tone")]), []
    for frame in range(5):
        seen.append(space.close_token("tone") in members(grammar.allowed(state)))
        state = grammar.advance(state, first + frame)
        assert grammar.allowed(state) == ((second, second + 5),)
        state = grammar.advance(state, second)
    assert seen == [False, False, True, True, True]
    assert members(grammar.allowed(state)) == {space.close_token("tone")}


def test_a_plan_is_followed_to_the_letter(grammar: Grammar) -> None:
    space = grammar.token_space
    state = grammar.walk(grammar.reply(("text", "image", "image"), {"image": (1, 2)}), [4, 5])
    assert members(grammar.allowed(state)) == {*range(10), space.open_token("image")}
    state = grammar.walk(state, [*image_ids(space, 1, 2), *image_ids(space, 1, 2)])
    assert members(grammar.allowed(state)) == {space.end}
    done = grammar.advance(state, space.end)
    assert grammar.finished(done) and not grammar.finished(state)
    assert grammar.reply("image") == grammar.reply(["image"])


def test_states_are_values(grammar: Grammar) -> None:
    other = Grammar(grammar.token_space)
    ids = [3, *image_ids(grammar.token_space, 2, 2)[:5]]
    one, two = (each.walk(each.reply(("text", "image")), ids) for each in (grammar, other))
    assert one == two and hash(one) == hash(two) and grammar.allowed(two) == other.allowed(one)


@pytest.mark.parametrize(
    ("plan", "sizes", "message"),
    [
        (("smell",), {}, "'smell' in output_kinds; allowed: text, image, tone"),
        ((), {}, "empty; name at least one of text, image, tone"),
        (("image", "text", "text"), {}, "two texts in a row"),
        (("tone",), {"tone": (3,)}, "'tone', which has no grid; modalities with one: image"),
        (("image",), {"smell": (3,)}, "'smell'"),
        (("image",), {"image": (3,)}, r"\(3,\); allowed: rows 1 to 16, cols 1 to 16"),
        (("image",), {"image": (3, 17)}, r"\(3, 17\)"),
        (("image",), {"image": (0, 3)}, r"\(0, 3\)"),
    ],
)
def test_plans_that_cannot_be_are_refused(
    grammar: Grammar, plan: tuple[str, ...], sizes: dict[str, tuple[int, ...]], message: str
) -> None:
    with pytest.raises(TokenSpaceError, match=message):
        grammar.reply(plan, sizes)


def test_a_plan_beyond_its_budget_is_refused_up_front(grammar: Grammar) -> None:
    state = grammar.reply(("text", "image", "tone"), {"image": (4, 4)})
    least = 1 + (2 + 2 + 16) + (2 + 4) + 1
    assert grammar.min_remaining(state) == least
    with pytest.raises(
        TokenSpaceError, match=f"{least - 1} ids are left.*takes {least}.*0 of the 3 output kinds"
    ):
        grammar.allowed(state, least - 1)


def test_errors_say_what_came_where_and_what_was_allowed(grammar: Grammar) -> None:
    space = grammar.token_space
    with pytest.raises(
        TokenSpaceError, match=r"Id 12 .*user.* is not allowed before the beginning; allowed: .*bos"
    ):
        grammar.advance(grammar.start(), space.user)
    ids = [space.bos, space.user, *image_ids(space, 2, 3)]
    with pytest.raises(
        TokenSpaceError, match=r"Place 7 .*/image.*after 2 of 6 codes.*user's turn; allowed: image:0 to "
    ):
        grammar.validate([*ids[:7], space.close_token("image")])
    with pytest.raises(TokenSpaceError, match=r"stop after 3 of 6 codes.*at least 5 more.*next image:0"):
        grammar.validate(ids[:8])
    with pytest.raises(TokenSpaceError, match=r"Id 999 \(unknown"):
        grammar.walk(grammar.reply(), [999])
    with pytest.raises(TokenSpaceError, match=r"whole numbers"):
        grammar.validate([space.bos, "user"])  # type: ignore[list-item]


@pytest.mark.parametrize(
    "ids",
    [
        [],
        ["user", 3, "end"],
        ["bos", "user", "end"],
        ["bos", "user", 3, "null", "end"],
        ["bos", "system", "null", "end"],
        ["bos", "user", "null", 3, "end"],
        ["bos", "bos"],
        ["bos", "user", 3],
        ["bos", "user", 3, "end", "pad"],
    ],
)
def test_what_is_no_whole_sequence(grammar: Grammar, ids: list[int | str]) -> None:
    space = grammar.token_space
    with pytest.raises(TokenSpaceError):
        grammar.validate([getattr(space, one) if isinstance(one, str) else one for one in ids])


def test_global_codes_stand_between_the_size_header_and_the_local_codes() -> None:
    space = TokenSpace(4)
    space.append_modality("image", [9], CodeGrid(("rows", "cols"), (1, 1), (4, 4), num_global_codes=2), 5)
    space.append_modality("tone", [7], CodeSequence(1, 3, num_global_codes=1), 3)
    grammar, globals_ = Grammar(space), space.global_range("image")
    code, open_ = space.code_range("image").start, space.open_token("image")
    ids = [open_, space.size_token(1), space.size_token(2), globals_.start + 4, globals_.start]
    ids += [code + 8, code, space.close_token("image")]
    (piece,) = grammar.parse(ids)
    assert piece.header.tolist() == [4, 0] and piece.values.tolist() == [[8], [0]] and piece.size == (1, 2)
    assert piece.codes == Codes(np.array([[8], [0]]), (1, 2), np.array([4, 0]))
    state = grammar.walk(grammar.reply(("image",)), ids[:4])
    assert grammar.allowed(state) == ((globals_.start, globals_.stop),)
    assert grammar.min_remaining(state) == 5
    with pytest.raises(
        TokenSpaceError, match=r"after 1 of 2 global codes of a segment of image.*allowed: image\.glo"
    ):
        grammar.advance(state, code)
    opened = grammar.walk(grammar.reply(("tone",)), [space.open_token("tone")])
    assert members(grammar.allowed(opened)) == set(range(*grammar.segments["tone"].global_codes[0]))
    with pytest.raises(TokenSpaceError, match=r"stop in the size header.*at least 6 more"):
        grammar.parse([open_])
    row = grammar.class_ranges[int(grammar.loss_rows(torch.tensor([globals_.start])))]
    assert row == ((globals_.start, globals_.stop),)


def test_validate_takes_tensors_and_arrays(grammar: Grammar) -> None:
    space = grammar.token_space
    ids = [space.bos, space.user, *image_ids(space, 2, 2), 3, space.end]
    for form in (ids, np.array(ids), torch.tensor(ids), iter(ids)):
        grammar.validate(form)


def test_parse_takes_fragments(grammar: Grammar) -> None:
    space = grammar.token_space
    image = image_ids(space, 1, 2)
    content = [1, 2, *image, 3]
    turn = [space.user, *content, space.end]
    for ids, role in [
        (content, ""),
        ([*content, space.end], ""),
        (turn, "user"),
        ([space.bos, *turn, space.assistant], "user"),
    ]:
        pieces = grammar.parse(ids)
        assert [(piece.kind, piece.values.tolist(), piece.size, piece.role) for piece in pieces] == [
            ("text", [1, 2], (), role),
            ("image", [[0], [0]], (1, 2), role),
            ("text", [3], (), role),
        ]
    assert grammar.parse([]) == []
    assert grammar.parse([space.bos, space.user, space.null, space.end]) == []
    for cut in range(1, len(image)):
        with pytest.raises(TokenSpaceError, match=r"stop .* more are needed to close"):
            grammar.parse(image[:cut])
    with pytest.raises(TokenSpaceError, match=r"Place 2.*after the end of the reply"):
        grammar.parse([1, space.end, 2])


def test_masks_and_indices(grammar: Grammar) -> None:
    ranges = grammar.allowed(grammar.reply())
    assert grammar.index(ranges).tolist() == sorted(members(ranges))
    mask = grammar.mask(ranges)
    assert mask.dtype == torch.bool and mask.shape == (grammar.vocab_size,)
    assert mask.nonzero().flatten().tolist() == sorted(members(ranges))
    assert grammar.mask(ranges) is mask and grammar.index(ranges) is grammar.index(ranges)
    assert not grammar.mask(()).any() and grammar.index(()).numel() == 0


def test_any_number_of_plans_is_served(grammar: Grammar, monkeypatch: pytest.MonkeyPatch) -> None:
    """Tables that were dropped from a full cache are made again when an old state comes back."""
    monkeypatch.setattr("anytoken.grammar.CACHE", 3)
    states = [grammar.reply(("image",) * count) for count in range(1, 9)]
    assert [grammar.min_remaining(state) for state in states] == [1 + 5 * count for count in range(1, 9)]
    assert [len(grammar.allowed(state)) for state in states] == [1] * 8


def test_loss_classes_of_a_small_space(grammar: Grammar) -> None:
    space = grammar.token_space

    def rivals(token: int) -> set[int]:
        return members(grammar.class_ranges[int(grammar.loss_rows(torch.tensor([token])))])

    first, second = (space.code_range("tone", book) for book in (0, 1))
    opens = {space.open_token("image"), space.open_token("tone")}
    assert rivals(3) == rivals(space.end) == {*range(10), space.end, space.null, *opens}
    assert rivals(space.user) == {space.user, space.assistant, space.system}
    assert rivals(space.size_token(2)) == {space.size_token(n) for n in range(1, 17)}
    assert rivals(space.close_token("image")) == {space.close_token("image")}
    assert rivals(first.start) == {*range(first.start, first.stop), space.close_token("tone")}
    assert rivals(second.start) == set(range(second.start, second.stop))


@given(frames=st.integers(1, 12), books=st.integers(1, 5))
def test_the_delay_pattern_by_hand_and_by_its_rule(frames: int, books: int) -> None:
    order = codebook_pattern(CodeSequence(1, 20, books, "delay"), frames)
    steps = [(f + q, q) for f, q in (divmod(int(flat), books) for flat in order)]
    assert steps == sorted(steps) and sorted(order) == list(range(frames * books))
    assert codebook_pattern(CodeSequence(1, 9, 3, "delay"), 3).tolist() == [0, 3, 1, 6, 4, 2, 7, 5, 8]
    assert codebook_pattern(CodeSequence(1, 9, 3), 2).tolist() == list(range(6))


@pytest.mark.parametrize("order", ["flatten", "delay"])
def test_codes_of_several_codebooks_come_back_in_either_order(order: str) -> None:
    space = TokenSpace(4)
    space.append_modality("tone", [7, 5, 6], CodeSequence(1, 5, 3, order))
    grammar, chance = Grammar(space), np.random.default_rng(0)
    starts = np.array([space.code_range("tone", book).start for book in range(3)])
    for frames in range(1, 6):
        codes = np.stack([chance.integers(0, size, frames) for size in (7, 5, 6)], 1)
        written = (codes + starts).ravel()[codebook_pattern(space.shapes["tone"], frames)]
        (piece,) = grammar.parse([space.open_token("tone"), *written.tolist(), space.close_token("tone")])
        assert np.array_equal(piece.values, codes)
