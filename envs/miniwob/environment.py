"""MiniWoB++: small web tasks in a real headless Chromium, its page as text.

`params["task"]` names the task ("click-test", or a list that the seed chooses from). `reset`
shows the instruction and the page's elements with their numbers; a step is click(6),
type(6, "text"), press("Enter"), click_at(80, 100) or wait(). The reward is the task's own, from
-1 to 1, with the end. Every instance has a browser, which ends with it.
"""

from __future__ import annotations

import difflib
import time
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from astuner.env.actions import marked_action
from astuner.env.protocol import Action, Info, action_text
from astuner.errors import EnvError, MissingDependency

from .page import Command, as_text, read_command, refs

if TYPE_CHECKING:
    from .browser import Browser

NO_LIMIT_MS = 10**9
READY_SECONDS = 10.0
HELP = 'An action is click(number), type(number, "text"), press("Enter"), click_at(x, y) or wait().'
BEGIN = """
core.EPISODE_MAX_TIME = arguments[2];
core.endEpisode(0);
Math.seedrandom(arguments[0]);
core.setDataMode(arguments[1]);
core.startEpisodeReal();
"""
LOOK = """
var page = core.getDOMInfo(), told = core.getUtterance(), choices = {};
document.querySelectorAll('select').forEach(function (one) {
  choices[one.dataset.wob_ref] = Array.from(one.options, function (o) { return o.text.trim(); });
});
return [told.utterance || told, page, choices];
"""
CLICK = "return core.elementClick(arguments[0]) === true;"
FOCUS = """
var one = core.previousDOMInfo[arguments[0]], words = arguments[1];
core.elementClick(arguments[0]);
if (!(one instanceof HTMLSelectElement)) { if (one.select) one.select(); return 'keys'; }
var wanted = Array.from(one.options).findIndex(function (o) { return o.text.trim() == words; });
if (wanted < 0) return 'none';
one.selectedIndex = wanted;
one.dispatchEvent(new Event('change', {bubbles: true}));
return 'chosen';
"""
"""Focus an element and select what it holds, so that typing replaces it; or choose an option."""
STATE = """
return {done: WOB_DONE_GLOBAL, env_reward: WOB_REWARD_GLOBAL, raw_reward: WOB_RAW_REWARD_GLOBAL,
        reason: WOB_REWARD_REASON};
"""

RewardOf = Callable[[Mapping[str, Any]], float]


class WebTask:
    """One browser, and the task that is played in it."""

    def __init__(
        self,
        browser: Browser,
        pages: Sequence[Path],
        reward_of: RewardOf,
        *,
        keys: Mapping[str, str],
        data_mode: str,
        seconds: float,
        settle: float,
        max_steps: int,
    ) -> None:
        self.browser = browser
        self._pages = list(pages)
        self._reward_of = reward_of
        self._keys = keys
        self._data_mode = data_mode
        self._limit_ms = round(1000 * seconds) or NO_LIMIT_MS
        self._settle = settle
        self._max_steps = max_steps
        self._seed = 0
        self._open: Path | None = None

    def reset(self, *, seed: int | None = None) -> tuple[str, Info]:
        self._seed = self._seed if seed is None else seed
        self._steps = 0
        page = self._pages[self._seed % len(self._pages)]
        if page != self._open:
            self.browser.open(page.as_uri())
            self._open = page
        self.browser.run(BEGIN, str(self._seed), self._data_mode, self._limit_ms)
        ends = time.monotonic() + READY_SECONDS
        while not self.browser.run("return WOB_TASK_READY;"):
            if time.monotonic() > ends:
                raise TimeoutError(f"The task {page.stem} is not ready after {READY_SECONDS:g} s")
            time.sleep(0.02)
        return self._look(), {"task": page.stem}

    def step(self, action: Action) -> tuple[str, float, bool, bool, Info]:
        self._steps += 1
        said = action_text(action)
        marked = marked_action(said)
        command = read_command(said if marked is None else marked)
        acted = command is not None and self._act(command)
        time.sleep(self._settle if acted else 0.0)
        state = self.browser.run(STATE)
        if state["done"]:
            why = state["reason"] or "The task is over."
            told = {"reason": state["reason"], "raw_reward": state["raw_reward"]}
            return str(why), self._reward_of(state), True, False, told
        shown = self._look() if acted else f"That is no action here. {HELP}\n{self._look()}"
        info: Info = {} if acted else {"invalid_action": True}
        return shown, 0.0, False, self._steps >= self._max_steps, info

    def get_info(self) -> str:
        return HELP

    def close(self) -> None:
        self.browser.close()

    def _look(self) -> str:
        told, page, choices = self.browser.run(LOOK)
        self._refs = refs(page)
        return f"Task: {' '.join(str(told).split())}\n{as_text(page, choices)}"

    def _act(self, command: Command) -> bool:
        """Whether it was possible."""
        if command.name == "press":
            special = self._keys.get(f"<{command.text}>", command.text)
            if len(special) == 1:
                self.browser.press(special)
            return len(special) == 1
        if command.name == "click_at":
            self.browser.click_at(*command.point)
        elif command.name in ("click", "type") and command.ref not in self._refs:
            return False
        elif command.name == "click":
            return bool(self.browser.run(CLICK, command.ref))
        elif command.name == "type":
            focused = self.browser.run(FOCUS, command.ref, command.text)
            if focused == "keys":
                self.browser.press(command.text)
            return bool(focused != "none")
        return True


def make(task_id: str, params: dict[str, Any]) -> WebTask:
    """One browser. Raises EnvError for an unknown task, or where there is no Chromium."""
    try:
        import miniwob
        from miniwob import reward
        from miniwob.constants import WEBDRIVER_SPECIAL_KEYS

        from .browser import Browser, find_chromium
    except ImportError:
        raise MissingDependency("miniwob", "miniwob", "The environment miniwob") from None
    options = {key: value for key, value in params.items() if key != "seed"}
    folder = Path(str(miniwob.__file__)).parent / "html" / "miniwob"
    pages = _pages(folder, options.pop("task", "click-test"))
    rewards: dict[str, RewardOf] = {
        "raw": reward.get_raw_reward,
        "original": reward.get_original_reward,
        "binary": reward.get_binary_reward,
    }
    kind = str(options.pop("reward", "raw"))
    programs = str(options.pop("chrome", "")), str(options.pop("chromedriver", ""))
    settings = {
        "data_mode": str(options.pop("data_mode", "train")),
        "seconds": float(options.pop("seconds", 0.0)),
        "settle": float(options.pop("settle", 0.05)),
        "max_steps": int(options.pop("max_steps", 20)),
    }
    if options or kind not in rewards:
        raise EnvError(
            f"miniwob does not know {options or {'reward': kind}}; see its README.",
            cause="refused",
        )
    browser = Browser(*find_chromium(*programs))
    return WebTask(browser, pages, rewards[kind], keys=WEBDRIVER_SPECIAL_KEYS, **settings)


def _pages(folder: Path, tasks: str | Sequence[str]) -> list[Path]:
    names = [tasks] if isinstance(tasks, str) else list(tasks)
    known = {path.stem: path for path in sorted(folder.glob("*.html"))}
    unknown = [name for name in names if name not in known]
    if unknown or not names:
        near = difflib.get_close_matches(str(unknown[0] if unknown else ""), known, n=3)
        hint = f"Did you mean {' or '.join(near)}? " if near else ""
        raise EnvError(
            f"MiniWoB++ has no task {', '.join(map(repr, unknown))}. {hint}There are "
            f"{len(known)}: {', '.join(known)}.",
            cause="refused",
        )
    return [known[name] for name in names]
