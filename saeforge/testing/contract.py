"""What a variant says of itself: shapes and constraints, a start that can be repeated, options that a file can hold."""

from __future__ import annotations

import json
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from saeforge.data.batch import Batch
from saeforge.errors import ConfigError
from saeforge.sae import SAE
from saeforge.testing.case import TOTAL_STEPS, WIDTH, Case, close
from saeforge.testing.outcome import CheckFailed
from saeforge.variants import DataStatistics, Recipe, StepOutput, Variant

UNIT_NORM = 1e-4  # fp32 rounding of a row's norm is 1e-7; the optimizer restores it every step


def shapes(case: Case) -> None:
    """Terms, code, counters, parameter groups, recipe, schedules and the folded SAE are of the shapes promised."""
    variant = case.variant()
    _step(variant, case.stepped(variant, case.batch()), 32)
    _groups(case.initialised())
    _settings(variant)
    _folded(variant, variant.fold())
    _transcoder(case)


def _step(variant: Variant, out: StepOutput, n: int) -> None:
    if not out.terms:
        raise CheckFailed("step returns no loss terms; name each summand of the loss in `terms`")
    for name, term in out.terms.items():
        if term.ndim or not term.is_floating_point():
            raise CheckFailed(f"term {name!r} has shape {tuple(term.shape)}; reduce it with self.mean_rows")
        if not bool(term.isfinite()):
            raise CheckFailed(f"term {name!r} is {term.item()}; look for 0 / 0, log 0 or sqrt 0")
    code = out.code
    if (code.n_rows, code.d_sae) != (n, variant.d_sae):
        raise CheckFailed(
            f"the code has {code.n_rows} rows of {code.d_sae} latents, expected {n} of {variant.d_sae}; "
            "return the code of the whole batch"
        )
    indices, rows = code.indices[: code.nnz], code.rows()
    if bool(((indices < 0) | (indices >= variant.d_sae)).any()):
        raise CheckFailed("the code holds latents outside 0..d_sae-1")
    if bool(((rows.diff() == 0) & (indices.diff() <= 0)).any()):
        raise CheckFailed("a row of the code names its latents out of order or twice; sort them and add up duplicates")
    if "squared_error" not in out.counters:
        raise CheckFailed("the counters lack squared_error; return self.output(terms, code, squared_error)")


def _groups(variant: Variant) -> None:
    groups = variant.param_groups()
    given = [id(parameter) for group in groups for parameter in group["params"]]
    names = {id(parameter): name for name, parameter in variant.named_parameters()}
    if missing := [name for key, name in names.items() if key not in given]:
        raise CheckFailed(f"param_groups leaves out {', '.join(missing)}, which would never be trained; add them")
    if len(set(given)) != len(given):
        raise CheckFailed("param_groups names a parameter twice; each belongs to one group")
    for group in groups:
        constraint = group.get("constraint")
        if constraint not in (None, "unit_norm"):
            raise CheckFailed(f"param_groups has constraint {constraint!r}; expected 'unit_norm' or None")
        for parameter in group["params"] if constraint == "unit_norm" else ():
            worst = float((parameter.detach().norm(dim=1) - 1).abs().max())
            if worst > UNIT_NORM:
                raise CheckFailed(
                    f"param_groups declares {names[id(parameter)]} unit_norm, but after initialise a row has norm "
                    f"1 +- {worst:.3g}; start from random_unit_rows, or drop the constraint"
                )


def _settings(variant: Variant) -> None:
    for steps in (1, TOTAL_STEPS, 1_000_000):
        if not isinstance(variant.recipe(steps), Recipe):
            raise CheckFailed(f"recipe({steps}) is no Recipe; return Recipe(lr=...)")
        for name, value in variant.schedules(steps).items():
            for step in (0, steps // 2, steps - 1):
                found = value(step)
                if not isinstance(found, int | float) or found != found:
                    raise CheckFailed(f"schedule {name!r} at step {step} of {steps} is {found!r}; return a number")
    steered = variant.sparsity_schedule
    if steered is not None and steered not in variant.schedules(TOTAL_STEPS):
        raise CheckFailed(
            f"sparsity_schedule names {steered!r}, which schedules does not return; target_l0 could not steer it"
        )


def _folded(variant: Variant, sae: SAE) -> None:
    if not isinstance(sae, SAE):
        raise CheckFailed(f"fold returns {type(sae).__name__}; return self.folded(...) or self.kept(...)")
    if (sae.d_in, sae.d_sae, sae.d_out) != (variant.d_in, variant.d_sae, variant.d_out):
        raise CheckFailed(
            f"fold returns an SAE of d_in, d_sae, d_out = {(sae.d_in, sae.d_sae, sae.d_out)}, "
            f"expected {(variant.d_in, variant.d_sae, variant.d_out)}"
        )
    x = torch.randn(2, 3, sae.d_in)
    if tuple(sae(x).shape) != (2, 3, sae.d_out):
        raise CheckFailed(f"the folded SAE makes {tuple(sae(x).shape)} of (2, 3, {sae.d_in})")


def _transcoder(case: Case) -> None:
    """Another target than the input, of another width; a variant may decline with ConfigError."""
    if case.sources:
        return  # the widths of the sources are fixed in the case
    x, target = case.rows(256), case.rows(256, seed=2)[:, : WIDTH - 3].contiguous()
    options = {
        **case.options,
        **({"pre_bias": False} if "pre_bias" in case.cls(WIDTH, WIDTH, **case.options).arguments else {}),
    }
    try:
        variant = case.cls(WIDTH, WIDTH - 3, **options)
        variant.bind(case.settings())
        statistics = DataStatistics(case.statistics(x).input, _narrow(target))
        variant.initialise(statistics, x, target, torch.Generator().manual_seed(0))
    except ConfigError:
        return
    out = variant.step(Batch(x, target, group=torch.arange(256) // 2), case.schedule(variant))
    _step(variant, out, 256)
    _folded(variant, variant.fold())


def _narrow(target: Tensor) -> Any:
    from saeforge.data.moments import Moments

    return Moments.of(target.double().numpy()).statistics()


def initialise(case: Case) -> None:
    """The same generator gives the same weights, whatever the global seed; all of them finite."""
    state = torch.get_rng_state()
    try:
        torch.manual_seed(1)
        one = case.initialised()
        torch.manual_seed(2)
        two = case.initialised()
    finally:
        torch.set_rng_state(state)
    for (name, a), b in zip(one.state_dict().items(), two.state_dict().values(), strict=True):
        if a.is_floating_point() and not bool(a.isfinite().all()):
            raise CheckFailed(f"after initialise {name} holds NaN or infinity; set every weight in initialise")
        if not torch.equal(a, b):
            raise CheckFailed(
                f"initialise gives another {name} under another global seed; draw from its `generator` alone, and set "
                "every weight (torch.empty holds whatever was in memory)"
            )
    if not close(one.scale, _scale_again(case, one), 1e-6):
        raise CheckFailed("initialise did not set the scale; call self.set_scale(stats) first")


def _scale_again(case: Case, variant: Variant) -> Tensor:
    other = case.cls(WIDTH, WIDTH, **case.options)
    other.set_scale(case.statistics(case.rows(1024, seed=0)))
    return other.scale


def config(case: Case) -> None:
    """YAML -> variant -> arguments -> YAML loses nothing, and the arguments are plain values."""
    import yaml
    from jsonargparse import ArgumentParser

    made = case.cls(WIDTH, WIDTH, **case.options).arguments
    try:
        plain = json.loads(json.dumps(made))
    except TypeError as error:
        raise CheckFailed(f"an option is no plain value ({error}); take numbers, strings, lists or null") from error
    if repr(case.cls(**made).arguments) != repr(made):
        raise CheckFailed("built of its own arguments it has others; do not change arguments in place")
    path = f"{case.cls.__module__}.{case.cls.__qualname__}"
    if "<locals>" in path:
        raise CheckFailed(f"{path} cannot be named in a file; define the class at the top of its module")
    parser = ArgumentParser(exit_on_error=False)
    parser.add_argument("--variant", type=Callable[[int, int], Variant])
    text = yaml.safe_dump({"variant": {"class_path": path, "init_args": _without_widths(plain)}})
    read = parser.parse_string(text)
    built = parser.instantiate(read).variant(WIDTH, WIDTH)
    for name, value in plain.items():
        found = built.arguments[name]
        if json.loads(json.dumps(found)) != plain[name]:
            raise CheckFailed(
                f"option {name} = {value!r} comes out of YAML as {found!r}; mend its type annotation, which is "
                "what the file is read by"
            )
    again = parser.parse_string(parser.dump(read))
    if again != read:
        raise CheckFailed("the configuration that is written beside a run reads back differently; use plain types")


def _without_widths(options: dict[str, Any]) -> dict[str, Any]:
    return {name: value for name, value in options.items() if name not in ("d_in", "d_out")}
