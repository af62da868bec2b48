"""A hook on a site: sees the activations there during a forward pass, and may replace them."""

from __future__ import annotations

import copy
from collections.abc import Callable
from typing import Any

import torch
from torch import nn
from torch.utils.hooks import RemovableHandle

from saeforge.errors import ConfigError
from saeforge.lm.sites import Site

See = Callable[[torch.Tensor], torch.Tensor | None]


def attach(model: nn.Module, site: Site, see: See) -> RemovableHandle:
    """Call `see` with the site's activations whenever its module runs.

    Args:
        model: a base model, or a model with a head around it.
        site: a resolved site.
        see: gets the tensor as the module has it, (batch, length, d) or (rows, d); what it returns takes its place,
            None leaves it.

    Returns:
        The handle to remove the hook with.

    Raises:
        ConfigError: the model has no such module; when it runs: the module has no floating tensor there.
    """
    return attach_to(site_module(model, site), site, see)


def attach_to(module: nn.Module, site: Site, see: See) -> RemovableHandle:
    """The same for a module that is at hand; `site` says whether its input or its output, and names it in errors."""

    def on_input(module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        # Attention gets hidden_states by keyword in transformers 5, layers get it by position.
        preferred = ["hidden_states"] if "hidden_states" in kwargs else []
        for key in (*preferred, *range(len(args)), *kwargs):
            x = args[key] if isinstance(key, int) else kwargs[key]
            if _is_activation(x):
                new = see(x)
                if new is None:
                    return None
                if isinstance(key, int):
                    return (*args[:key], new, *args[key + 1 :]), kwargs
                return args, {**kwargs, key: new}
        raise ConfigError(f"site {site.id}: the module gets no activations; choose another site")

    def on_output(module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any], output: Any) -> Any:
        # Layers return a tensor (transformers 5) or a tuple (4); attention a tuple; a whole model an output object.
        if _is_activation(output):
            return see(output)
        keys = output if isinstance(output, dict) else range(len(output) if isinstance(output, tuple | list) else 0)
        for key in keys:
            if _is_activation(output[key]):
                new = see(output[key])
                if new is None:
                    return None
                if isinstance(output, tuple):
                    parts = (*output[:key], new, *output[key + 1 :])
                    return type(output)(*parts) if hasattr(output, "_fields") else parts
                replaced = copy.copy(output)
                replaced[key] = new
                return replaced
        raise ConfigError(f"site {site.id}: the module returns no activations; choose another site")

    if site.where == "in":
        return module.register_forward_pre_hook(on_input, with_kwargs=True)
    return module.register_forward_hook(on_output, with_kwargs=True)


def site_module(model: nn.Module, site: Site) -> nn.Module:
    """Return the module of a site, whose path is that of the base model, in the base model or one with a head.

    Raises:
        ConfigError: there is none.
    """
    prefix = getattr(model, "base_model_prefix", "")
    for path in (site.module_path, f"{prefix}.{site.module_path}"):
        try:
            return model.get_submodule(path)
        except AttributeError:
            continue
    raise ConfigError(
        f"site {site.id}: {type(model).__name__} has no module {site.module_path}; is it the model that the "
        "activations came from?"
    )


def _is_activation(value: Any) -> bool:
    return isinstance(value, torch.Tensor) and value.is_floating_point()
