"""Measures how well spikes are detected on labelled synthetic curves, by this project's detector and by other rules.

A curve is a power law with noise, with spikes, level shifts, drifts and NaN inserted at known steps. An *early* curve
is the beginning of a run, where the loss falls fast, with narrow and wide spikes. A spike is *found* when an alarm is
raised within six steps of its start; it is *separable* when it starts at least twelve steps outside another one. An
alarm in the noise between them is false. Synthetic curves show which rule detects more of what was inserted; they prove
nothing about real ones.
"""

from __future__ import annotations

import math
import random
import time
from collections.abc import Callable, Iterator
from functools import partial

from kha_train.stability.benchmark import Curve, Planted, Score, score_rule
from kha_train.stability.events import OPEN_Z, EventDetector, Observation
from kha_train.stability.monitor import Monitor
from kha_train.stability.scores import SignalScores
from kha_train.stability.window import Window, usable

SEPARATION = 12
LABELLED_STEPS = 6000
EARLY_STEPS, EARLY_FIRST, EARLY_SIGMA = 1500, 200, 0.03
"""Number of steps of an early curve, the first step at which a spike may begin, and the noise in nats."""

Noise = Callable[[random.Random], float]


def normal(source: random.Random) -> float:
    """Gaussian, unit scale."""
    return source.gauss(0.0, 1.0)


def student(source: random.Random) -> float:
    """Student's t with 4 degrees of freedom, scaled to unit variance: single steps of 7 sigma are common."""
    chi2 = sum(source.gauss(0.0, 1.0) ** 2 for _ in range(4))
    return source.gauss(0.0, 1.0) / math.sqrt(chi2 / 4) / math.sqrt(2.0)


def mixed(source: random.Random) -> float:
    """Half Gaussian, half heavy-tailed: the noise of the reference table."""
    return 0.7 * normal(source) + 0.7 * student(source)


def laplace(source: random.Random) -> float:
    """Double exponential, unit variance."""
    return math.copysign(source.expovariate(1.0), source.random() - 0.5) / math.sqrt(2.0)


def skewed(source: random.Random) -> float:
    """Skewed upward (a shifted gamma of shape 4, unit variance): hard batches are more common than easy ones."""
    return (source.gammavariate(4.0, 1.0) - 4.0) / 2.0


NOISES: dict[str, Noise] = {
    "normal": normal, "mixed": mixed, "student": student, "laplace": laplace, "skewed": skewed
}  # fmt: skip
REFERENCE_NOISES = ("normal", "mixed")


def base_curve(source: random.Random, steps: int, noise: Noise, sigma: float) -> list[float]:
    """A loss falling as a power law from about 10 to about 2, with slightly correlated neighbouring steps."""
    floor, drop, exponent = source.uniform(1.6, 2.2), source.uniform(7.0, 9.0), source.uniform(0.25, 0.45)
    start = source.uniform(10.0, 60.0)
    values, carried = [], 0.0
    for step in range(steps):
        carried = 0.2 * carried + 0.98 * sigma * noise(source)
        values.append(floor + drop * (1 + step / start) ** -exponent + carried)
    return values


def clean_curve(seed: int, steps: int, noise: str) -> Curve:
    """A curve in which every alarm is false."""
    source = random.Random(f"clean {seed} {noise}")
    return Curve(base_curve(source, steps, NOISES[noise], source.uniform(0.015, 0.04)))


def spiky_curve(seed: int, steps: int, noise: str) -> Curve:
    """A curve with disturbances in random order: narrow and wide spikes of 0.25 to 6 nats, overlapping pairs, level
    shifts, slow drifts and NaN. Half of them follow the previous one closely, as spikes of real runs do.
    """
    source = random.Random(f"spiky {seed} {noise}")
    curve = Curve(base_curve(source, steps, NOISES[noise], source.uniform(0.015, 0.03)))
    step = 600
    while step < steps - 400:
        kind = source.choices(
            ("narrow", "wide", "overlapping", "nan", "drift", "level_shift"), (8, 6, 4, 2, 1, 0.4)
        )[0]  # fmt: skip
        PLANT[kind](source, curve, step)
        pause = (15, 100) if source.random() < 0.5 else (300, 500)
        step = curve.planted[-1].end + source.randint(*pause)
    return curve


def early_curve(seed: int, noise: str, spikes: bool = True) -> Curve:
    """The first 1,500 steps of a run, 2.2 + 6.5 exp(-t / tau) + 1.2 (t + 50)^-0.25 with tau of 300 to 900 steps, and
    narrow and wide spikes of 0.35 to 2.5 nats from step 200 on; none without `spikes`."""
    source = random.Random(f"early {seed} {noise}")
    tau, draw = source.uniform(300.0, 900.0), NOISES[noise]
    steps = range(EARLY_STEPS)
    trend = (2.2 + 6.5 * math.exp(-step / tau) + 1.2 * (step + 50) ** -0.25 for step in steps)
    curve = Curve([value + EARLY_SIGMA * draw(source) for value in trend])
    step = EARLY_FIRST + source.randint(0, 100)
    while spikes and step < EARLY_STEPS - 100:
        plant = source.choices((_narrow, _wide), (8, 6))[0]
        plant(source, curve, step, _height(source, 0.35, 2.5))
        pause = (15, 100) if source.random() < 0.5 else (100, 300)
        step = curve.planted[-1].end + source.randint(*pause)
    return curve


def _height(source: random.Random, low: float = 0.25, high: float = 6.0) -> float:
    return math.exp(source.uniform(math.log(low), math.log(high)))


def _bump(losses: list[float], start: int, height: float, rise: int, decay: float) -> int:
    """Add a rise over `rise` steps and an exponential fall; the last step above a hundredth of a nat."""
    length = rise + math.ceil(decay * math.log(max(height / 0.01, 2.0)))
    for offset in range(min(length, len(losses) - start)):
        share = (offset + 1) / rise if offset < rise else math.exp(-(offset - rise + 1) / decay)
        losses[start + offset] += height * share
    return start + length


def _narrow(source: random.Random, curve: Curve, start: int, height: float | None = None) -> None:
    end = _bump(curve.losses, start, height or _height(source), 1, source.uniform(0.3, 2.0))
    curve.planted.append(Planted("narrow", start, end, True))


def _wide(source: random.Random, curve: Curve, start: int, height: float | None = None) -> None:
    end = _bump(curve.losses, start, height or _height(source), source.randint(1, 3), source.uniform(8.0, 60.0))
    curve.planted.append(Planted("wide", start, end, True))


def _overlapping(source: random.Random, curve: Curve, start: int) -> None:
    _wide(source, curve, start)
    second = start + source.randint(3, SEPARATION - 1)
    end = _bump(curve.losses, second, _height(source), 1, source.uniform(2.0, 10.0))
    curve.planted.append(Planted("overlapping", second, max(end, curve.planted[-1].end), False))


def _nan(source: random.Random, curve: Curve, start: int) -> None:
    length = source.randint(1, 3)
    for step in range(start, start + length):
        curve.losses[step] = source.choice((math.nan, math.inf))
    curve.planted.append(Planted("nan", start, start + length - 1, True))


def _drift(source: random.Random, curve: Curve, start: int) -> None:
    """A lasting rise over hundreds of steps: not a spike."""
    length, height = source.randint(400, 800), source.uniform(0.1, 0.5)
    for step in range(start, len(curve.losses)):
        curve.losses[step] += height * min(1.0, (step - start) / length)
    curve.planted.append(Planted("drift", start, start + length, False))


def _level_shift(source: random.Random, curve: Curve, start: int) -> None:
    """A lasting jump: one unrecovered event, not a spike."""
    height = source.uniform(0.5, 1.0)
    for step in range(start, len(curve.losses)):
        curve.losses[step] += height
    curve.planted.append(Planted("level_shift", start, start + 2200, False))


PLANT: dict[str, Callable[[random.Random, Curve, int], None]] = {
    "narrow": _narrow, "wide": _wide, "overlapping": _overlapping, "nan": _nan, "drift": _drift,
    "level_shift": _level_shift,
}  # fmt: skip


# The rules. Each yields, step by step, whether it raises an alarm.


def event_detector(losses: list[float], open_z: float = OPEN_Z) -> Iterator[bool]:
    """This project's detector: an alarm when an event opens."""
    detector = EventDetector(open_z=open_z)
    for step, loss in enumerate(losses):
        yield detector.update(Observation(step, loss)).opened


def olmo_paper(losses: list[float]) -> Iterator[bool]:
    """OLMo 2, upward: x >= mean + 7 sd of the previous 1,000."""
    scores = SignalScores()
    for loss in losses:
        before = scores.upward.flagged
        scores.update(loss)
        yield scores.upward.flagged > before


def olmo_core(losses: list[float]) -> Iterator[bool]:
    """OLMo-core's monitor: x > mean + 6 sd of the previous 128."""
    scores = SignalScores()
    for loss in losses:
        yield scores.update(loss) > 6.0


def llm_foundry(losses: list[float]) -> Iterator[bool]:
    """llm-foundry: x >= 2 x the mean of the previous 100 (its window for runs up to 2,000 steps), 5 in a row."""
    window, in_a_row = Window(100), 0
    for loss in losses:
        in_a_row = in_a_row + 1 if window.full and not loss < 2 * window.mean else 0
        if usable(loss):
            window.push(loss)
        yield in_a_row >= 5


def megatron(losses: list[float]) -> Iterator[bool]:
    """Megatron: x >= 10 x the largest of the first 100, or not finite."""
    largest, count = 0.0, 0
    for loss in losses:
        alarm = not usable(loss) or (count >= 100 and loss >= 10 * largest)
        if usable(loss) and count < 100:
            largest, count = max(largest, loss), count + 1
        yield alarm


RULES: dict[str, Callable[[list[float]], Iterator[bool]]] = {
    "kha_train events": event_detector,
    "OLMo-core 6 sd / 128": olmo_core,
    "OLMo 2 7 sd / 1,000": olmo_paper,
    "llm-foundry 2x, 5 in a row": llm_foundry,
    "Megatron 10x": megatron,
}


def alarms_of(rule: Callable[[list[float]], Iterator[bool]], losses: list[float]) -> list[int]:
    """The steps at which `rule` raises an alarm."""
    return [step for step, alarm in enumerate(rule(losses)) if alarm]


def labelled_set() -> Iterator[tuple[str, Curve]]:
    """The curves of `stability/labelled.jsonl`: for each noise one with spikes, a clean one, the beginning of a run."""
    for noise in NOISES:
        yield f"spiky {noise}", spiky_curve(0, LABELLED_STEPS, noise)
        yield f"clean {noise}", clean_curve(0, LABELLED_STEPS // 2, noise)
        yield f"early {noise}", early_curve(0, noise)


def score_rules(curves: list[Curve], rules: dict[str, Callable[[list[float]], Iterator[bool]]]) -> dict[str, Score]:
    """Every rule on the same curves."""
    return {name: score_rule(curves, partial(alarms_of, rule)) for name, rule in rules.items()}


def run_bench(seed: int, spiky_steps: int, clean_steps: int, noises: list[str]) -> dict[str, dict[str, Score]]:
    """Every rule on curves of each noise family: one of `spiky_steps` and one of `clean_steps`, with seeds from `seed`
    on.
    """
    return {
        noise: score_rules([spiky_curve(seed, spiky_steps, noise), clean_curve(seed, clean_steps, noise)], RULES)
        for noise in noises
    }


def run_early(seed: int, curves: int) -> dict[str, Score]:
    """Every rule on `curves` early curves of each reference noise, with seeds from `seed` on."""
    return score_rules([early_curve(seed + n, noise) for n in range(curves) for noise in REFERENCE_NOISES], RULES)


def monitor_cost(steps: int = 5000) -> float:
    """CPU seconds that the whole monitor takes per step, mean over `steps` with full windows."""
    monitor = Monitor()
    losses = clean_curve(0, steps + 2000, "normal").losses
    for step, loss in enumerate(losses[:2000]):
        monitor.update(Observation(step, loss, 1.0 + 0.1 * loss))
    started = time.process_time()
    for step, loss in enumerate(losses[2000:], start=2000):
        monitor.update(Observation(step, loss, 1.0 + 0.1 * loss))
    return (time.process_time() - started) / steps
