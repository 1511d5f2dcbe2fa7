"""The held-out examples of every direction, and the judgement of answers."""

import zlib
from collections import defaultdict
from collections.abc import Callable, Mapping, Sequence
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np

from anytoken.data.records import open_media
from anytoken.data.sources import read_records
from anytoken.emoji_world import dialogues
from anytoken.emoji_world.directions import IMAGES, SPEECH, VIDEOS, WORDS, Direction, EvalExample, Record
from anytoken.emoji_world.dna import translate
from anytoken.emoji_world.identity import Drawing, Identity, IdentityJudge
from anytoken.emoji_world.judges import (
    BackgroundJudge,
    ImageClassifier,
    SpeakerClassifier,
    fit_classifier,
    mel_frames,
    motion,
)
from anytoken.evaluation.keyword_asr import KeywordRecognizer
from anytoken.evaluation.metrics import same_text, same_words, sequence_identity
from anytoken.evaluation.transcriber import Transcriber
from anytoken.segments import KINDS, Image, Segment, Speech, Text, Video
from anytoken.utils.errors import EvaluationError

Parts = dict[str, float]
ANIMATED = "3d"  # the style that videos are drawn in
LAYOUT = ("size", "place")  # what else tells drawings apart, where records have it
TOP = 5
# Which styles a concept judge must not have seen, by the style it judges: close relatives are left out together.
RELATIVES = {"3d": ("3d",), "line": ("line", "noto"), "noto": ("line", "noto"), "flat": ("flat", "twemoji")}
RELATIVES["twemoji"] = RELATIVES["flat"]


class EvalDatasets:
    """The built sets, and the judges made from them, created on first use."""

    def __init__(
        self, sets: str | Path, judge_steps: int = 1500, seed: int = 0, asr: Transcriber | None = None
    ) -> None:
        self.sets = Path(sets)
        self.asr = asr
        self.judge_steps = judge_steps
        self.seed = seed
        self._records: dict[str, list[Record]] = {}
        self._classifiers: dict[str, ImageClassifier] = {}

    def records(self, file: str) -> list[Record]:
        """The records of one file of the sets; EvaluationError if it is missing."""
        if file not in self._records:
            path = self.sets / file
            if not path.is_file():
                raise EvaluationError(f"{path} is missing: build the sets with `anytoken data` first.")
            self._records[file] = list(read_records(path))
        return self._records[file]

    def has(self, direction: Direction) -> bool:
        """Whether the sets hold what a direction is made from."""
        return all(
            (self.sets / file).is_file() for file in (direction.file, direction.pair or direction.file)
        )

    def media(self, file: str, record: Record, kind: str) -> Segment:
        """One medium of a record."""
        if kind == "text":
            return Text(record["text"])
        return open_media(record[kind], KINDS[kind], (self.sets / file).parent)

    def cases(self, direction: Direction, split: str, count: int, seed: int = 0) -> list[EvalExample]:
        """Up to `count` examples of a split, sampled without replacement, the same for the same seed."""
        if direction.how == "requests":
            return dialogues.requests(self, split, count, seed)
        if direction.how == "turns":
            return dialogues.turns(self, split, count, seed, direction.name == dialogues.SECOND)
        rng = np.random.default_rng((seed, zlib.crc32(f"{direction.name} {split}".encode())))
        records = [
            one
            for one in self.records(direction.file)
            if one.get("split") == split and self._fits(direction, one)
        ]
        order = rng.permutation(len(records))
        partners = self._partners(direction, split)
        cases: list[EvalExample] = []
        for place, index in enumerate(order):
            if len(cases) == count:
                break
            record = records[index]
            if direction.twice:
                cases.append(self._two(direction, record, records[order[(place + 1) % len(order)]]))
            elif direction.pair is None:
                cases.append(self._one(direction, record))
            elif partners.get(record["name"]):
                options = partners[record["name"]]
                cases.append(self._paired(direction, record, options[int(rng.integers(len(options)))]))
        return cases

    def _fits(self, direction: Direction, record: Record) -> bool:
        kinds = {*direction.sources, direction.target} - ({direction.target} if direction.pair else set())
        if any(record.get(kind) is None for kind in kinds):
            return False
        if direction.file == SPEECH and not record.get("core", True):
            return False
        if direction.file == WORDS and record["split"] == "test" and record["holdout"] != "word":
            return direction.target == "text"  # a held-out voice can be recognized, but not requested
        if direction.name == "text->speech" and record.get("holdout") not in (None, "spoken"):
            return False
        return direction.target != "speech" or self.hears(record).knows(record["name"])

    def _partners(self, direction: Direction, split: str) -> dict[str, list[Record]]:
        """Records that provide the answer, by name. Training prompts get training answers; test prompts get any."""
        found: dict[str, list[Record]] = defaultdict(list)
        for record in self.records(direction.pair) if direction.pair else []:
            if split != "train" or record.get("split") == "train":
                found[record["name"]].append(record)
        return found

    def _one(self, direction: Direction, record: Record) -> EvalExample:
        prompt = [self.media(direction.file, record, kind) for kind in direction.sources]
        if direction.target == "speech" and "voice" in record:
            prompt = [Text(f"{record['text']}, voice {record['voice']}")]
        return EvalExample(prompt, self.media(direction.file, record, direction.target), record)

    def _paired(self, direction: Direction, record: Record, partner: Record) -> EvalExample:
        """Only the concept is judged, since the prompt does not specify a style, a background or a voice."""
        prompt = [self.media(direction.file, record, kind) for kind in direction.sources]
        answer = self.media(str(direction.pair), partner, direction.target)
        return EvalExample(prompt, answer, {"name": record["name"], "holdout": record.get("holdout")})

    def _two(self, direction: Direction, record: Record, other: Record) -> EvalExample:
        images = [self.media(direction.file, one, "image") for one in (record, other)]
        answer = " and ".join(str(one["text"]).split(",")[0] for one in (record, other))
        return EvalExample(
            [*images, Text(direction.words)], Text(answer), {"name": record["name"], "text": answer}
        )

    @cached_property
    def words(self) -> KeywordRecognizer:
        """Recognizes the core names."""
        return KeywordRecognizer(
            sorted({one["name"] for one in self.records(SPEECH) if one.get("core", True)})
        )

    @cached_property
    def unseen_words(self) -> KeywordRecognizer:
        """Recognizes the held-out words."""
        return KeywordRecognizer(
            sorted({one["name"] for one in self.records(WORDS) if one["holdout"] == "word"})
        )

    def hears(self, record: Record) -> KeywordRecognizer:
        """The recognizer whose list contains the name of a record."""
        return self.unseen_words if record.get("holdout") == "word" else self.words

    @cached_property
    def voices(self) -> SpeakerClassifier:
        """Classifies the voices of the training clips, trained on clips of non-core names if possible."""
        clips: dict[str, list[Record]] = defaultdict(list)
        for record in sorted(self.records(SPEECH), key=lambda one: bool(one.get("core"))):
            if record["split"] == "train":
                clips[record["voice"]].append(record)
        chosen = [one for group in clips.values() for one in group[:80]]
        heard = [self.media(SPEECH, one, "speech") for one in chosen]
        return SpeakerClassifier(
            [one for one in heard if isinstance(one, Speech)], [one["voice"] for one in chosen]
        )

    def concepts(self, style: str) -> ImageClassifier:
        """Classifies concepts in a style, trained only on drawings of other styles."""
        unseen = RELATIVES.get(style, (style,))
        key = "-".join(unseen)
        if key not in self._classifiers:
            records = [one for one in self.records(IMAGES) if one["style"] not in unseen]
            drawn = [self.pixels(one) for one in records]
            images = np.stack(drawn) if drawn else np.zeros((0, 64, 64, 3), np.uint8)
            names = [one["name"] for one in records]
            self._classifiers[key] = fit_classifier(images, names, self.judge_steps, self.seed)
        return self._classifiers[key]

    @cached_property
    def stills(self) -> IdentityJudge:
        """Identifies the concept and the style of an image among all known drawings."""
        return self._identity(IMAGES, "image")

    @cached_property
    def clips(self) -> IdentityJudge:
        """Identifies the concept of a video among all known animations."""
        return self._identity(VIDEOS, "video")

    def _identity(self, file: str, kind: str) -> IdentityJudge:
        """Drawings are represented by compositions that are not held out, if there are any."""
        groups: dict[tuple[str, ...], list[Record]] = defaultdict(list)
        for record in self.records(file):
            drawing = (record["name"], record.get("style", ANIMATED), *map(str, map(record.get, LAYOUT)))
            groups[drawing].append(record)
        return IdentityJudge(
            Drawing(
                name,
                style,
                [
                    self.media(file, one, kind)
                    for one in [one for one in group if one.get("holdout") != "pair"] or group
                ],
            )
            for (name, style, *_), group in groups.items()
        )

    @cached_property
    def backgrounds(self) -> BackgroundJudge:
        """Classifies background colors."""
        records = [one for one in self.records(IMAGES) if one["split"] == "train"]
        images = np.stack([self.pixels(one) for one in records[:: max(1, len(records) // 800)]])
        return BackgroundJudge(images, [one["background"] for one in records[:: max(1, len(records) // 800)]])

    @cached_property
    def least_motion(self) -> float:
        """The motion that 95 % of real training videos exceed."""
        records = [one for one in self.records(VIDEOS) if one["split"] == "train"][::7][:200]
        videos = [self.media(VIDEOS, one, "video") for one in records]
        return float(np.percentile([motion(one) for one in videos if isinstance(one, Video)], 5))

    def pixels(self, record: Record) -> np.ndarray:
        """The pixels of an image record."""
        image = self.media(IMAGES, record, "image")
        assert isinstance(image, Image)
        return image.pixels

    def nothings(self, kind: str) -> dict[str, Segment]:
        """Meaningless answers of a kind, which every judge must reject."""
        rng = np.random.default_rng(self.seed)
        noise = rng.integers(0, 256, (8, 64, 64, 3), dtype=np.uint8)
        hiss = rng.normal(0, 0.1, 16_000).astype(np.float32)
        known: dict[str, dict[str, Segment]] = {
            "image": {"noise": Image(noise[0])},
            "video": {"noise": Video(noise, 4.0), "grey": Video(np.full_like(noise, 128), 4.0)},
            "speech": {"noise": Speech(hiss, 16_000), "silence": Speech(np.zeros_like(hiss), 16_000)},
        }
        return known.get(kind, {})

    def judge(self, direction: Direction, case: EvalExample, answer: Segment | None) -> Parts:
        """Judge an answer: "right" is full correctness, the other parts show where it failed."""
        if answer is None or answer.kind != direction.target:
            return {"right": 0.0}
        return JUDGES[direction.target](self, case, answer)


def _judge_text(world: EvalDatasets, case: EvalExample, answer: Any) -> Parts:
    target = case.answer
    assert isinstance(target, Text)
    if "dna" in case.record:
        identity = sequence_identity(answer.text.split(), target.text.split())
        return {"right": float(same_text(answer.text, target.text)), "identity": identity}
    parts = {"right": float(same_text(answer.text, target.text))}
    if "name" in case.record:
        parts["concept"] = float(same_text(answer.text.split(",")[0], target.text.split(",")[0]))
    return parts


def _judge_image(world: EvalDatasets, case: EvalExample, answer: Any) -> Parts:
    record, seen = case.record, world.stills.identify(answer)
    independent = world.concepts(record.get("style", seen.style)).predict(answer) == record["name"]
    parts = _concept_parts(seen, record, independent)
    if "style" not in record:
        return {"right": parts["concept"], **parts}
    background = world.backgrounds.predict(answer) == record["background"]
    checked = {"style": float(seen.style == record["style"]), "background": float(background)}
    return {"right": min(parts["concept"], *checked.values()), **parts, **checked}


def _concept_parts(seen: Identity, record: Record, independent: bool) -> Parts:
    """The concept by the identity judge, top-1 and top-5; and by the classifier of other styles."""
    return {
        "concept": float(seen.concept == record["name"]),
        "concept top-5": float(record["name"] in seen.concepts[:TOP]),
        "concept, other judge": float(independent),
    }


def _judge_speech(world: EvalDatasets, case: EvalExample, answer: Any) -> Parts:
    name = case.record["name"]
    words = float(world.hears(case.record).transcribe(answer) == name)
    parts = {"words": words}
    if world.asr is not None:
        parts["words, open vocabulary"] = float(same_words(world.asr.transcribe(answer), name))
    if "voice" not in case.record:
        return {"right": words, **parts}
    voice = float(world.voices.predict(answer) == case.record["voice"])
    return {"right": min(words, voice), **parts, "voice": voice}


def _judge_video(world: EvalDatasets, case: EvalExample, answer: Any) -> Parts:
    record, seen = case.record, world.clips.identify(answer)
    parts = _concept_parts(seen, record, world.concepts(ANIMATED).predict(answer) == record["name"])
    background = world.backgrounds.predict(answer) == record["background"]
    checked = {"background": float(background), "moves": float(motion(answer) >= world.least_motion)}
    return {"right": min(parts["concept"], *checked.values()), **parts, **checked}


def _judge_dna(world: EvalDatasets, case: EvalExample, answer: Any) -> Parts:
    residues = case.record["text"].split()
    identity = sequence_identity(translate(answer.bases), residues)
    return {"right": float(identity == 1), "identity": identity}


JUDGES: Mapping[str, Callable[[EvalDatasets, EvalExample, Any], Parts]] = {
    "text": _judge_text,
    "image": _judge_image,
    "speech": _judge_speech,
    "video": _judge_video,
    "dna": _judge_dna,
}


def features(prompts: Sequence[list[Segment]]) -> np.ndarray:
    """One vector per prompt, for the nearest-neighbor baseline: its words, pixels, spectrum or bases; [N, D]."""
    vocabulary: dict[str, int] = {}
    for prompt in prompts:
        for segment in prompt:
            for word in _words(segment):
                vocabulary.setdefault(word, len(vocabulary))
    return np.stack(
        [np.concatenate([_vector(segment, vocabulary) for segment in prompt]) for prompt in prompts]
    )


def _words(segment: Segment) -> list[str]:
    return segment.text.casefold().replace(",", " ").split() if isinstance(segment, Text) else []


def _vector(segment: Any, vocabulary: Mapping[str, int]) -> np.ndarray:
    if segment.kind == "text":
        vector = np.zeros(len(vocabulary), np.float32)
        for word in _words(segment):
            vector[vocabulary[word]] += 1
        return vector / max(1e-6, float(np.linalg.norm(vector)))
    if segment.kind == "image":
        return segment.resize(16, 16).pixels.astype(np.float32).ravel() / 255
    if segment.kind == "video":
        steps = np.linspace(0, len(segment.frames) - 1, 4).round().astype(int)
        return np.concatenate([_vector(Image(segment.frames[step]), vocabulary) for step in steps])
    if segment.kind == "speech":
        frames = mel_frames(segment).numpy()
        steps = np.linspace(0, len(frames) - 1, 32).round().astype(int)
        return (frames[steps] - frames.mean()).ravel()
    letters = np.frombuffer(segment.bases[:48].ljust(48).encode(), np.uint8)
    return np.concatenate([letters == ord(base) for base in "ACGT"]).astype(np.float32)
