"""The page of all commands and options, from the commands themselves: `python -m cond_pdiff.cli.document > docs/command_line.md`."""

from __future__ import annotations

from typing import Any

from cond_pdiff.cli import PROGRAM, command

HEAD = f"""\
# Command line

For whoever types `{PROGRAM}` and wants to know what a command takes: every command with its arguments, options and defaults. The commands
wrote this page themselves: `python -m cond_pdiff.cli.document > docs/command_line.md`.

Every command takes `--help`. Those with `--json` then print their result as one JSON value and nothing else on stdout; progress and notes
go to stderr. The exit status is 0, 1 for an error that the message explains, 2 for a wrong usage, and 130 for an interrupt.
`{PROGRAM} --install-completion` makes the shell complete commands and options, and `python -m cond_pdiff` is the same as `{PROGRAM}`."""


def commands_document() -> str:
    """Render every command with its usage, help, arguments and options as Markdown: `docs/command_line.md`."""
    return "\n\n".join([HEAD, *_parts(command, PROGRAM)])


def _parts(group: Any, name: str) -> list[str]:
    """Return the parts of a group's commands, those of groups inside it in their place."""
    parts = []
    for inner, found in sorted(group.commands.items()):
        full = f"{name} {inner}"
        parts += _parts(found, full) if hasattr(found, "commands") else [_part(found, full)]
    return parts


def _part(found: Any, name: str) -> str:
    shown = [param for param in found.params if param.name != "help"]
    usage = " ".join([name, *(_name(param) for param in shown if param.required), "[OPTIONS]"])
    about = "\n\n".join(" ".join(part.split()) for part in (found.help or "").split("\n\n"))
    rows = "\n".join(f"| `{_name(param)}` | {_meaning(param)} |".replace("|||", "\\|\\|\\|") for param in shown)
    return f"## {name}\n\n{about}\n\n```text\n{usage}\n```\n\n| argument or option | meaning |\n|---|---|\n{rows}"


def _name(param: Any) -> str:
    """Return an argument's word, or an option with what stands behind it."""
    if param.param_type_name == "argument":
        return f"{param.metavar}{' …' if param.nargs == -1 else ''}"
    return "/".join([*param.opts, *param.secondary_opts]) + ("" if param.is_flag else f" {param.metavar.replace('|', '/')}")


def _meaning(param: Any) -> str:
    """Return an option's help, with its default where it has one that the help does not tell."""
    telling = not param.required and isinstance(param.default, str | int | float) and not isinstance(param.default, bool)
    told = f" Default: {param.default}." if telling else ""
    return " ".join((param.help or "").split()).replace("<", "&lt;") + (" Needed." if param.required else told)


if __name__ == "__main__":
    print(commands_document())
