"""`results.json` of studies that nobody ran, with known laws: what collect would have written."""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np

ARMS = {
    "cola": {"title": "Cola DLM", "family": "cola"},
    "autoregressive": {"title": "Autoregressive", "family": "autoregressive"},
    "llada": {"title": "LLaDA", "family": "masked_diffusion"},
}
KINDS = {"cola": "bound", "autoregressive": "exact", "llada": "bound"}
LAWS = {"cola": (2.4, 3000.0, 0.27), "autoregressive": (2.2, 1800.0, 0.26), "llada": (2.6, 4000.0, 0.28)}
"""E, A, alpha against model FLOPs, stage 1 left out."""
STAGE_ONE = 4e11
PROMPTS = ("The weather in the north was", "She opened the letter and", "Of all the things that he had said,")


def write(folder: Path, results: dict[str, Any]) -> Path:
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "results.json").write_text(json.dumps(results))
    return folder


def study(name: str, arms: Sequence[str] = tuple(ARMS), **more: Any) -> dict[str, Any]:
    return {
        "name": name,
        "title": f"{name}: a made-up study",
        "question": "Which family learns most from a budget of compute?",
        "scale": "tiny",
        "budget_column": "model",
        "fit": {"loss": "nats_per_token", "score": "last_word", "chance": 0.0},
        "arms": {arm: ARMS[arm] for arm in arms},
        "axes": {},
        "published": [],
        **more,
    }


def row(arm: str, budget: float, seed: int, loss: float, score: float | None, **more: Any) -> dict[str, Any]:
    """A finished point; `more` replaces its fields."""
    label = f"{budget:.2g}".replace("e+", "e")
    point = f"{arm}-{label}-s{seed}"
    has_stage_one = arm == "cola"
    steps = max(20, round(budget / 1.2e10))
    measures: dict[str, Any] = {"nats_per_token": {"value": loss, "error": 0.02, "kind": KINDS[arm]}}
    if score is not None:
        measures["last_word"] = {"value": score, "error": float(np.sqrt(score * (1 - score) / 200)), "items": 200}
    curve = [
        [int(step), "nats_per_token", loss + 2.5 * (1 - step / steps)] for step in np.linspace(steps / 8, steps, 8)
    ]
    if arm == "cola":
        measures["flow_matching_loss"] = {"value": loss / 4, "error": 0.01}
        curve += [[step, "flow_matching_loss", value / 4] for step, _, value in curve]
    return {
        "point": point,
        "run": point,
        "step": steps,
        "state": "finished",
        "error": None,
        "arm": arm,
        "size": "m",
        "settings": {},
        "seed": seed,
        "budget": budget,
        "stage_one": f"cola-vae-s{seed}" if has_stage_one else None,
        "trunk": None,
        "parameters": {"without embeddings": 1_230_000, "all": 2_186_544},
        "tokens": steps * 2048,
        "steps": steps,
        "compute": {"nominal": 0.8 * budget, "model": budget, "hardware": 1.15 * budget},
        "stage_one_compute": {
            "nominal": 0.0,
            "model": STAGE_ONE if has_stage_one else 0.0,
            "hardware": 1.1 * STAGE_ONE if has_stage_one else 0.0,
        },
        "seconds": budget / 3e9,
        "devices": 1,
        "device": "cpu",
        "device_hours": budget / 3e9 / 3600,
        "mfu": 0.31,
        "measures": measures,
        "curve": curve,
        "samples": [
            {
                "prompt": prompt,
                "continuation": f" {'so ' * (1 + index)}much, wrote {ARMS[arm]['title']} with {label} FLOPs.",
                "original": " as it had been for weeks, grey and without any wind.",
            }
            for index, prompt in enumerate(PROMPTS)
        ],
        **more,
    }


def one_size(
    budgets: Sequence[float] = (1e12, 3e12, 1e13, 3e13),
    seeds: Sequence[int] = (66, 67),
    noise: float = 0.004,
    draw: int = 0,
    shared: bool = False,
) -> dict[str, Any]:
    """Three arms of one size; `shared`: seeds move all arms alike."""
    random = np.random.default_rng(draw)
    own = {key: random.standard_normal() for key in [(a, b, s) for a in ARMS for b in budgets for s in seeds]}
    rows = []
    for arm, (E, A, alpha) in LAWS.items():
        for budget in budgets:
            for seed in seeds:
                moved = own["cola", budget, seed] if shared else own[arm, budget, seed]
                loss = (E + A / budget**alpha) * np.exp(noise * moved)
                score = 0.5 / (1 + (2e13 / budget) ** (0.7 if arm == "llada" else 0.9)) + 0.01 * random.random()
                rows.append(row(arm, budget, seed, float(loss), float(score)))
    numbers = (("cola", 3.89e20, 0.169), ("cola", 1.95e21, 0.264), ("autoregressive", 1.95e21, 0.214))
    published = [
        {"arm": arm, "column": "nominal", "compute": compute, "score": score} for arm, compute, score in numbers
    ]
    return {"study": study("families", published=published), "rows": rows, "lost": []}


def several_sizes(sizes: int = 3, budgets: Sequence[float] = (1e12, 4e12, 1.6e13), draw: int = 0) -> dict[str, Any]:
    """Two arms, sizes around the best one, branches of a trunk per size and seed."""
    random = np.random.default_rng(draw)
    rows = []
    for arm, shift in (("cola", 1.1), ("autoregressive", 1.0)):
        for seed in (66, 67):
            for index in range(sizes):
                N = 2e5 * 4**index
                for budget in budgets:
                    D = budget / (6 * N)
                    loss = shift * (1.8 + 30 / N**0.3 + 60 / D**0.3) * np.exp(0.003 * random.standard_normal())
                    size = "sml"[index]
                    each = row(arm, budget, seed, float(loss), None, size=size, tokens=D)
                    each["parameters"] = {"without embeddings": N, "all": N + 2e5}
                    each["point"] = each["run"] = f"{each['point']}-{size}"
                    each["trunk"] = f"{arm}-{size}-s{seed}"
                    rows.append(each)
    return {"study": study("sizes", ("cola", "autoregressive")), "rows": rows, "lost": []}


def axes(seeds: Sequence[int] = (66, 67), budgets: Sequence[float] = (1e13,)) -> dict[str, Any]:
    """One arm, loc by latent size."""
    random = np.random.default_rng(0)
    places = {"16": 1.0, "64": 1.7, "128": 2.3}
    locs = ("1", "1.7", "2.3")
    rows = []
    for latent, best in places.items():
        for loc in locs:
            for budget in budgets:
                for seed in seeds:
                    loss = 4 + 0.12 * (float(loc) - best) ** 2 - 0.3 * np.log10(budget / 1e13)
                    loss += 0.02 * random.standard_normal() - 0.05 * list(places).index(latent)
                    score = 0.12 - 0.05 * (float(loc) - best) ** 2 + 0.02 * random.standard_normal()
                    each = row("cola", budget, seed, float(loss), float(np.clip(score, 0.005, 1)))
                    each["settings"] = {"loc": loc, "latent": latent}
                    each["point"] = each["run"] = f"{each['point']}-loc{loc}-d{latent}"
                    rows.append(each)
    described = {
        "loc": {"title": "loc of flow times", "labels": list(locs)},
        "latent": {"title": "latent size", "labels": list(places)},
    }
    return {"study": study("latents", ("cola",), axes=described), "rows": rows, "lost": []}


def half_finished() -> dict[str, Any]:
    """The study of one size with failed, running and missing points."""
    found = one_size()
    rows = found["rows"]
    rows[3] |= {"state": "failed", "error": "ran out of memory at step 12", "measures": {}, "samples": []}
    rows[7] |= {"state": "running", "measures": {}, "samples": [], "mfu": None}
    bare = {"point": "llada-3e13-s67", "run": "llada-3e13-s67", "state": "not begun", "arm": "llada", "budget": 3e13}
    rows[-1] = {**bare, "seed": 67}
    rows[9]["measures"].pop("last_word")
    found["lost"] = [{"point": rows[3]["point"], "why": "failed: ran out of memory at step 12"}]
    return found
