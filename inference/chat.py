"""Chat with a model in the terminal; generated media are saved with the conversation.

    python inference/chat.py
    python inference/chat.py --save talk          # continues the conversation if the folder exists

A line may begin with files: `@cat.png What is this?`. `again` regenerates the last reply, `undo` removes the last
exchange, and an empty line ends the conversation. `anytoken chat` is the complete version.
"""

import argparse
from pathlib import Path

import anytoken
from anytoken.inference.streaming import Event, SegmentFinished, TextDelta, finish
from anytoken.segments import open_segment

parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
parser.add_argument("--model", default="mini", help="bundled name, folder or hub id")
parser.add_argument("--system", help="system text")
parser.add_argument("--save", type=Path, default=Path("out/chat"), help="folder of the conversation")
arguments = parser.parse_args()

model = anytoken.load(arguments.model)
if (arguments.save / "chat.json").is_file():
    chat = anytoken.Chat.load(arguments.save, model)
else:
    chat = model.chat(system=arguments.system)


def ask() -> str:
    """The next line; an empty one at the end of the input."""
    try:
        return input("> ").strip()
    except EOFError:
        return ""


def see(event: Event) -> None:
    """Show text as it is generated, and a description of finished media."""
    if isinstance(event, TextDelta):
        print(event.text, end="", flush=True)
    elif isinstance(event, SegmentFinished) and event.segment.kind != "text":
        print(event.segment)


while line := ask():
    words = line.split()
    files = [word[1:] for word in words if word.startswith("@")]
    text = " ".join(word for word in words if not word.startswith("@"))
    try:
        if line == "undo":
            chat.undo()
        elif line == "again":
            finish(chat.regenerate_stream(), see)
        else:
            finish(chat.stream([open_segment(name) for name in files] + ([text] if text else [])), see)
        print()
    except ValueError as error:  # the conversation is unchanged: show the error and continue
        print(error)
        continue
    print(f"[{chat.save(arguments.save)}]")
