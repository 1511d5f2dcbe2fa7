"""Stream a reply: text and bases as they are generated, audio in chunks, image previews from the top.

    python inference/stream.py "a fox, 3d, blue background" --output image
    python inference/stream.py "fox, voice slt" --output speech        # audio is written before the clip ends
    python inference/stream.py "a fox" --output text speech image

OUT/speech.wav grows while it is generated, and each preview of an image is a separate file.
"""

import argparse
from pathlib import Path

import soundfile

import anytoken
from anytoken.inference.streaming import (
    Event,
    SegmentDelta,
    SegmentFinished,
    SegmentPreview,
    SegmentProgress,
    SegmentStarted,
    TextDelta,
    finish,
)
from anytoken.segments import DNA, Speech, usual_suffix

parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
parser.add_argument("prompt", help="words")
parser.add_argument("--output", nargs="+", help="kinds to answer with; without it the model decides")
parser.add_argument("--model", default="mini", help="bundled name, folder or hub id")
parser.add_argument("--seed", type=int, default=0)
parser.add_argument("--out", type=Path, default=Path("out/stream"), help="folder for the files")
arguments = parser.parse_args()

model = anytoken.load(arguments.model)
arguments.out.mkdir(parents=True, exist_ok=True)
sound_path = arguments.out / "speech.wav"
sound: soundfile.SoundFile | None = None
previews = 0


def see(event: Event) -> None:
    """Show one event."""
    global previews, sound
    match event:
        case SegmentStarted(kind):
            print(f"[{kind}]", flush=True)
        case TextDelta(text):
            print(text, end="", flush=True)
        case SegmentProgress(kind, done, total):
            print(f"  {done} of {total or '?'} codes", flush=True)
        case SegmentDelta(segment=Speech() as chunk):
            if sound is None:
                sound = soundfile.SoundFile(sound_path, "w", chunk.sample_rate_hz, channels=1)
            sound.write(chunk.samples)  # or play it
            print(f"  {chunk.seconds:.2f} s of audio", flush=True)
        case SegmentDelta(segment=DNA() as piece):
            print(piece.bases, end="", flush=True)
        case SegmentPreview(segment=picture):
            previews += 1
            print(picture.save(arguments.out / f"preview-{previews}{usual_suffix(picture.kind)}"), flush=True)
        case SegmentFinished(segment):
            print() if segment.kind == "text" else print(segment)


try:
    reply = finish(model.stream(arguments.prompt, arguments.output, seed=arguments.seed), see)
finally:
    if sound is not None:
        sound.close()
print(f"{reply.usage.new_tokens} tokens, {reply.usage.tokens_per_second:.0f} tokens/s")
