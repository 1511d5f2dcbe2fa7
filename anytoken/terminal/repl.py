"""`anytoken chat`: a conversation in the terminal, with files in and out, history and undo."""

from __future__ import annotations

import os
import shlex
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path
from typing import TYPE_CHECKING, Any

from rich.console import Console

from anytoken.terminal.prompt_args import PART_KINDS, read_typed
from anytoken.terminal.render import show_events
from anytoken.utils.errors import RequestError

if TYPE_CHECKING:
    from anytoken.inference.chat import Chat
    from anytoken.segments import Segment

OUTPUTS = {"/draw": "image", "/say": "speech", "/animate": "video", "/sequence": "dna", "/tell": "text"}
HELP = """\
/image PATH  /speech PATH  /video PATH  /dna PATH   attach to your next message
/draw TEXT   /say TEXT     /animate TEXT            generate an image, speech, a video
/tell TEXT   /sequence TEXT                         generate text, DNA
/ask KINDS TEXT      choose the output kinds: /ask text,image a fox
/regenerate [SEED]   replace the last reply with a new one
/edit TEXT           replace the text of your last message (its files stay) and get a new reply
/undo                remove your last message and its reply
/save [DIR]          save the conversation and its files
/load DIR            continue a saved conversation
/show                show the conversation
/help  /quit         Ctrl-C stops a reply"""
COMMANDS = (
    *(f"/{kind}" for kind in PART_KINDS if kind != "text"), *OUTPUTS, "/ask", "/regenerate", "/edit", "/undo",
    "/save", "/load", "/show", "/help", "/quit",
)  # fmt: skip

NEED_A_VALUE = (*(f"/{kind}" for kind in PART_KINDS), "/ask", "/edit", "/load")


class ChatRepl:
    """The chat loop: reads and executes lines; errors never lose the conversation."""

    def __init__(self, chat: Chat, out: Path, console: Console, **options: Any) -> None:
        self.chat, self.out, self.console, self.options = chat, out, console, options
        self.attached: list[Segment] = []

    def run(self, read: Callable[[], str], interactive: bool = False) -> None:
        """Chat until /quit or the end of input; Ctrl-C stops a reply, or clears the line at an interactive prompt."""
        if interactive:
            self._note(HELP)
        while True:
            try:
                line = read().strip()
                if line.split(" ")[0] in ("/quit", "/exit"):
                    return
                self.handle_command(line)
            except EOFError:
                return
            except KeyboardInterrupt:
                if not interactive:
                    raise
                self._note("\nstopped; /quit or Ctrl-D ends the conversation")
            except (ValueError, OSError) as error:
                line = " ".join(str(error).split())
                self.console.print(line, style="red", markup=False, highlight=False, soft_wrap=True)

    def handle_command(self, line: str) -> None:
        """Execute one line. ValueError or OSError says what is wrong; the conversation is then unchanged."""
        command, _, rest = line.partition(" ")
        rest = rest.strip()
        if command in NEED_A_VALUE and not rest:
            raise RequestError(f"{command} needs an argument; see /help.")
        if not line.startswith("/") or _is_path(line):
            if line or self.attached:
                self._say(line)
        elif command in OUTPUTS:
            self._say(rest, OUTPUTS[command])
        elif command[1:] in PART_KINDS:
            self.attached.append(read_typed(command[1:], _path(rest) or rest))
            self._note(f"attached {self.attached[-1]!r}")
        elif command == "/ask":
            kinds, _, words = rest.partition(" ")
            self._say(words, kinds.split(","))
        elif command == "/edit":
            self._edit(rest)
        else:
            self._manage(command, _path(rest))

    def _manage(self, command: str, argument: str) -> None:
        """The commands that manage the conversation."""
        if command == "/regenerate":
            seed = {"seed": _seed(argument)}
            show_events(self.chat.regenerate_stream(**{**self.options, **seed}), self.out, self.console)
        elif command == "/undo":
            self.chat.undo()
            self._note(f"removed; {len(self.chat)} messages are left")
        elif command == "/save":
            self._note(f"saved {self.chat.save(argument or self.out / 'chat')}")
        elif command == "/load":
            self.chat = self.chat.load(argument, self.chat.model)
            self.chat.show()
        elif command == "/show":
            self.chat.show()
        elif command == "/help":
            self._note(HELP)
        else:
            raise RequestError(f"Unknown command {command}; /help lists them.")

    def _say(self, words: str, output: Any = None) -> None:
        prompt = [*self.attached, *([words] if words.strip() else [])]
        show_events(self.chat.stream(prompt, output, **self.options), self.out, self.console)
        self.attached = []

    def _edit(self, words: str) -> None:
        """The conversation changes only once the new reply is complete."""
        from anytoken.segments import Text

        before = list(self.chat.turns)
        said = self.chat.undo()
        output = before[len(self.chat)].output
        files = [segment for segment in said if not isinstance(segment, Text)]
        try:
            show_events(self.chat.stream([*files, words], output, **self.options), self.out, self.console)
        except BaseException:
            self.chat.turns = before
            raise

    def _note(self, text: str) -> None:
        self.console.print(text, style="dim", markup=False, highlight=False)


def _is_path(line: str) -> bool:
    """Whether a line that begins with a slash is prose about a path, such as "/etc/passwd is a file"."""
    return "/" in line.split(" ")[0][1:]


def _path(argument: str) -> str:
    """A path with shell quoting, as terminals insert it for a dropped file."""
    try:
        words = shlex.split(argument)
    except ValueError:  # an apostrophe in a name
        return argument
    return os.path.expanduser(words[0] if len(words) == 1 else argument)


def _seed(argument: str) -> int | None:
    if argument and not argument.isdecimal():
        raise RequestError(
            f"/regenerate takes a seed, an integer of at least 0, or nothing; received {argument!r}."
        )
    return int(argument) if argument else None


def line_reader(history: Path | None = None) -> Callable[[], str]:
    """`input` with editing, completion of commands and paths, and a persistent history.

    history: by default in the XDG state folder; without write access there is no history.
    """
    try:
        import readline
    except ImportError:  # Windows
        return lambda: input("> ")
    state = os.environ.get("XDG_STATE_HOME") or os.path.expanduser("~/.local/state")
    path = history or Path(state, "anytoken", "chat_history")
    readline.set_completer_delims(" \t\n")
    readline.set_completer(_complete)
    readline.parse_and_bind("tab: complete")
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        path.touch()
        readline.read_history_file(path)
    except OSError:
        return lambda: input("> ")
    readline.set_history_length(1000)

    def read() -> str:
        line = input("\001\033[1m\002> \001\033[0m\002")
        with suppress(OSError):
            readline.write_history_file(path)
        return line

    return read


def _complete(text: str, state: int) -> str | None:
    from glob import escape, glob

    if text.startswith("/") and "/" not in text[1:]:
        found = [f"{command} " for command in COMMANDS if command.startswith(text)]
    else:
        matches = sorted(glob(escape(os.path.expanduser(text)) + "*"))
        found = [f"{match}/" if os.path.isdir(match) else match for match in matches]
    return found[state] if state < len(found) else None
