"""What a probe has found: tables, a picture and the lines of a config."""

from pathlib import Path

from rich.table import Table

from ..run.probed import Found
from .plots import pictures


def tables(found: Found) -> list[Table]:
    """The sigmas that were tried, and the step lengths with the best of them. A star is at the best ones."""
    sigmas = Table("", "sigma", "center", "members", "spread", "signal", "expected gain")
    for one in found.sigmas:
        numbers = (one.sigma, one.center, one.reward, one.spread, one.signal, one.expected_gain)
        sigmas.add_row("*" if one is found.sigma else "", *map(_number, numbers))
    if found.sigma is None:
        return [sigmas]
    lengths = Table("", "learning rate", "held-out", "change")
    lengths.add_row("", "0", _number(found.before), "")
    for learning_rate, reward in found.held_out.items():
        star = "*" if learning_rate == found.best_held_out else ""
        lengths.add_row(star, _number(learning_rate), _number(reward), f"{reward - found.before:+.3g}")
    return [sigmas, lengths]


def plot(found: Found, path: Path) -> None:
    """Draw rewards and signal over sigma, and held-out rewards over the learning rate."""
    sigmas = [one.sigma for one in found.sigmas]
    means, spreads = [one.reward for one in found.sigmas], [one.spread for one in found.sigmas]
    known = [(one.sigma, one.signal) for one in found.sigmas if one.signal is not None]
    with pictures(path, 3, figsize=(12, 4)) as every:
        rewards, signals, lengths = every
        rewards.plot(sigmas, [one.center for one in found.sigmas], "--", label="unperturbed")
        rewards.errorbar(sigmas, means, spreads, marker="o", capsize=3, label="members, spread")
        rewards.set(xlabel="sigma", ylabel="reward")
        if known:
            signals.plot(*zip(*known, strict=True), marker="o")
        signals.set(xlabel="sigma", ylabel="signal")
        if found.sigma is not None:
            lengths.axhline(found.before, linestyle="--", label="before")
            lengths.plot(*zip(*found.held_out.items(), strict=True), marker="o", label="after one update")
        lengths.set(xlabel="learning rate", ylabel="held-out reward")
        for axes in every:
            axes.set_xscale("log")


def advice(found: Found) -> str:
    """What to do: the lines of a config, or what else to try."""
    if found.sigma is None:
        return (
            "No sigma has a signal: members differ by luck, or the noise breaks the model. Raise `population_size` or "
            "`num_prompts_per_step`, take a reward that tells completions apart, or probe around another `sigma`."
        )
    lines = [f"sigma: {found.sigma.sigma:.4g}"]
    if found.learning_rate is not None:
        lines.append(f"learning_rate: {found.learning_rate:.4g}  # half of the best single step")
    else:
        lines.append("# No step raised the held-out reward: raise population_size or num_prompts_per_step")
    if found.sigma in (found.sigmas[0], found.sigmas[-1]):
        lines.append("# This is the end of what was tried: probe again around this sigma")
    return "\n".join(lines)


def _number(value: float | None) -> str:
    return "-" if value is None else f"{value:.4g}"
