"""Which model and site an SAE belongs to, from what it says of itself."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from saeforge.data.site_names import INSIDE, parse_alias
from saeforge.errors import ConfigError
from saeforge.lm.causal import CausalLM, load_causal_lm
from saeforge.lm.load import LoadedModel, load_model, load_tokenizer, own_code_error
from saeforge.lm.sites import Site
from saeforge.sae import SAE


@dataclass(frozen=True)
class Origin:
    """Where an SAE's activations come from.

    Attributes:
        model: folder, hub name, `package:NAME` or `demo`.
        revision: hub revision, or None.
        site: the site that the SAE reads.
        target: the site that it writes, which is `site` but for a transcoder.
        files_sha256: of the model's files when the activations were harvested; None for a hub model.
        remote_code: Python code that came with the model made the activations.
        trust_remote_code: such code may run.
    """

    model: str
    revision: str | None
    site: Site
    target: Site
    files_sha256: str | None
    remote_code: bool = False
    trust_remote_code: bool = False

    def load_base(self, *, device: str = "cpu", dtype: str = "auto") -> LoadedModel:
        """Load the model without its head, as deep as the site.

        Raises:
            ConfigError: it cannot be loaded, its weights are not those that the SAE was trained on, or it needs its own
                code and may not run it.
        """
        self._check_trust()
        loaded = load_model(
            self.model,
            [self.site.id],
            revision=self.revision,
            device=device,
            dtype=dtype,
            trust_remote_code=self.trust_remote_code,
        )
        self._check(loaded.card)
        return loaded

    def load_causal(self, *, device: str = "cpu", dtype: str = "auto") -> CausalLM:
        """Load the model with its head and tokenizer.

        Raises:
            ConfigError: as `load_base`, or it is no causal language model.
        """
        self._check_trust()
        loaded = load_causal_lm(
            self.model,
            revision=self.revision,
            device=device,
            dtype=dtype,
            trust_remote_code=self.trust_remote_code,
        )
        self._check(loaded.card)
        return loaded

    def load_tokenizer(self) -> Any:
        """Load the model's tokenizer.

        Raises:
            ConfigError: there is none, or it needs its own code and may not run it.
        """
        return load_tokenizer(self.model, self.revision, trust_remote_code=self.trust_remote_code)

    def _check_trust(self) -> None:
        """Without its code transformers would take its own architecture of that name, where it has one."""
        if self.remote_code and not self.trust_remote_code:
            raise own_code_error(self.model)

    def _check(self, card: dict[str, Any]) -> None:
        if self.files_sha256 is not None and card["files_sha256"] not in (None, self.files_sha256):
            raise ConfigError(
                f"model {self.model!r} has changed since this SAE's activations were harvested; restore it, or harvest "
                "and train again"
            )


def origin_of(sae: SAE, *, model: str | None = None, trust_remote_code: bool = False) -> Origin:
    """Return the model and site that an SAE says it was trained on; see `origin_from`.

    Raises:
        ConfigError: the SAE does not say so: it was trained on activations of unknown origin, or of several sites.
    """
    return origin_from(sae.meta, model=model, trust_remote_code=trust_remote_code)


def origin_from(meta: Mapping[str, Any], *, model: str | None = None, trust_remote_code: bool = False) -> Origin:
    """Return the model and site of a provenance.

    Args:
        meta: the provenance that `saeforge fit` leaves in an SAE, or that its data has (`Pair.identity`).
        model: where the model is now, if it moved.
        trust_remote_code: what is loaded may run Python code that comes with the model.

    Raises:
        ConfigError: it names no model, or several sites.
    """
    _check_one_site(meta)
    card, record = meta.get("model") or {}, meta.get("site") or {}
    name = model or card.get("name")
    if not name or not card.get("name"):
        raise ConfigError(
            "this SAE does not say which model its activations came from (it was trained on a tensor); train it on a "
            "dataset made by `saeforge harvest`"
        )
    site = Site(record["module_path"], record["where"])
    target = meta.get("target") or record
    return Origin(
        name,
        card.get("revision"),
        site,
        Site(target["module_path"], target["where"]),
        card.get("files_sha256"),
        remote_code=bool(card.get("remote_code")),
        trust_remote_code=trust_remote_code,
    )


def describe_origin(
    model: str, site: str, target: str | None = None, *, widths: tuple[int, int], trust_remote_code: bool = False
) -> dict[str, Any]:
    """Return what `sae.meta` says of an SAE's model and sites, for one that was trained elsewhere.

    Args:
        model: folder, hub name, `package:NAME` or `demo`; loaded as deep as the sites.
        site: where it reads; an id, a path or an alias.
        target: where it writes, if elsewhere.
        widths: its d_in and d_out.
        trust_remote_code: run Python code that comes with the model.

    Raises:
        ConfigError: no such model or site, or a site in the residual stream of another width.
    """
    elsewhere = [target] if target is not None and target != site else []
    loaded = load_model(model, [site, *elsewhere], trust_remote_code=trust_remote_code)
    hidden = getattr(loaded.model.config.get_text_config(), "hidden_size", None)  # type: ignore[union-attr, operator]
    found = {}
    for name, place, width in zip(("site", "target"), loaded.sites, widths, strict=False):
        kind = parse_alias(place.alias or "")
        if kind is not None and kind[0] not in INSIDE and hidden not in (None, width):
            raise ConfigError(
                f"{place.alias} of model {model!r} is {hidden} wide, this SAE is {width} there; check the model"
            )
        found[name] = {"id": place.id, "module_path": place.module_path, "where": place.where, "d": width}
    return {"model": loaded.card, "target": None, **found}


def check_one_site(sae: SAE) -> None:
    """Refuses an SAE of several sources: there is no one place in one model that it reads.

    Raises:
        ConfigError: naming its sources.
    """
    _check_one_site(sae.meta)


def _check_one_site(meta: Mapping[str, Any]) -> None:
    parts = meta.get("sources")
    if parts:
        names = [(part.get("site") or {}).get("id") or f"{part['d']} values in memory" for part in parts]
        raise ConfigError(
            f"this SAE reads several sites side by side ({', '.join(names)}), a crosscoder: only its reconstruction of "
            "stored activations can be judged; with the model itself, use an SAE of one site"
        )
