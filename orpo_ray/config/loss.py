"""The `loss` section: the objective, its settings, and presets that count tokens as other code bases do."""

from __future__ import annotations

from typing import Any, Literal

from pydantic import Field, field_validator, model_validator

from orpo_ray.config.section import Section, absolute_if_local

_PRESETS: dict[str, dict[str, Any]] = {
    "trl": {
        "nll_scope": "prompt_and_response",
        "nll_reduction": "token",
        "nll_eos": True,
        "answer_padding": False,
    },
    "llamafactory": {
        "nll_scope": "response",
        "nll_reduction": "pair",
        "nll_eos": True,
        "answer_padding": False,
    },
    "authors": {
        "nll_scope": "prompt_and_response",
        "nll_reduction": "token",
        "nll_eos": False,
        "answer_padding": True,
    },
}
"""What TRL 1.16's ORPOTrainer, LLaMA-Factory's `pref_loss: orpo` and the authors' xfactlab/orpo count."""

_OWN_SETTINGS: dict[str, dict[str, Any]] = {
    "orpo": {"orpo_lambda": 0.1, "ratio": "odds", "temperature": 1.0},
    "sft": {"orpo_lambda": 0.0},
    "dpo": {"beta": 0.1},
    "cpo": {"beta": 0.1, "nll_weight": 1.0},
    "simpo": {"beta": 2.0, "simpo_gamma": 0.5},
    "ipo": {"beta": 0.1},
    "reward": {},
    "rloo": {"beta": 0.05, "reward_model": None, "max_new_tokens": 128},
}
"""Loss -> the settings that it reads and not all losses do, with their defaults: TRL 1.16's, for simpo its authors'."""


class LossConfig(Section):
    """The objective, with everything that gives its numbers a meaning said out loud.

    orpo is L = NLL + orpo_lambda * L_OR (paper eq. 6). A setting that the chosen loss does not read is null, and
    refused if given.
    """

    name: Literal["orpo", "sft", "dpo", "cpo", "simpo", "ipo", "reward", "rloo"] = "orpo"
    """`sft` is the NLL alone: λ = 0 exactly. dpo and ipo compare with a reference model, the one training starts from;
    dpo, ipo and simpo have no NLL in their objective, and report it. `reward` trains a reward model instead of a
    language model (Bradley-Terry, paper eq. 11). `rloo` is RLHF: it samples two answers to each prompt, has
    `reward_model` judge them, and raises the better one (Ahmadian et al. 2024, with a KL penalty)."""
    preset: Literal["trl", "llamafactory", "authors"] | None = None
    """Count as another ORPO code base does: sets `nll_scope`, `nll_reduction`, `nll_eos` and `answer_padding`. TRL and
    the authors average the token means of micro-batches, here it is the mean over the global batch: their numbers are
    reproduced where the batch is one micro-batch on one worker, and λ keeps its meaning where it is not."""
    orpo_lambda: float | None = Field(None, ge=0)
    """orpo, sft: the paper's λ (TRL: `beta`; the authors' code: `alpha`); 0.1 by default, 0 for sft."""
    ratio: Literal["odds", "probability"] | None = None
    """orpo: what is compared, odds P / (1 - P) (the default) or, as the paper's ablation does, P itself."""
    temperature: float | None = Field(None, gt=0)
    """orpo: multiplies the log ratio inside the sigmoid (`b` of arXiv 2502.01237); 1 by default, the paper's."""
    beta: float | None = Field(None, gt=0)
    """dpo, cpo, simpo: multiplies the log ratio of the answers; ipo: τ, which asks for a log ratio of 1 / (2τ); rloo:
    what a nat of KL divergence from the model that training starts from costs. 0.1 by default, 2 for simpo, 0.05 for
    rloo."""
    simpo_gamma: float | None = Field(None, ge=0)
    """simpo: margin that the rewards should keep, TRL's `simpo_gamma`; 0.5 by default."""
    nll_weight: float | None = Field(None, ge=0)
    """cpo: weight of the NLL, TRL's `cpo_alpha`; 1 by default. TRL's NLL counts the response only."""
    reward_model: str | None = Field(None, min_length=1)
    """rloo: folder or hub name of the reward model, e.g. what `orpo-ray export` writes of a run with `name: reward`."""
    max_new_tokens: int | None = Field(None, ge=1)
    """rloo: longest answer drawn, in tokens; 128 by default."""
    nll_scope: Literal["prompt_and_response", "response"] = "prompt_and_response"
    """Tokens of [prompt | chosen] that the NLL counts."""
    nll_reduction: Literal["token", "pair"] = "token"
    """Mean over all counted tokens of the global batch, or over pairs of each pair's token mean."""
    nll_eos: bool = True
    """Whether EOS tokens count in the NLL, those within the prompt too. They count in the answers' means either way."""
    answer_padding: bool = False
    """Whether the first padding token (an EOS) behind an answer counts as one more token of it in the answers' means,
    as in the authors' code, whose mask is off by one."""

    @property
    def needs_reference(self) -> bool:
        """Whether the loss compares with a reference model's log-probabilities."""
        return self.name in ("dpo", "ipo")

    @property
    def is_reward(self) -> bool:
        """Whether a reward model is trained: what the model gives an answer is a reward, not a log-probability."""
        return self.name == "reward"

    @field_validator("reward_model")
    @classmethod
    def _local_path_is_absolute(cls, path: str | None) -> str | None:
        return path and absolute_if_local(path)

    @property
    def own_settings(self) -> dict[str, Any]:
        """The settings that this loss reads and not all losses do."""
        return {setting: getattr(self, setting) for setting in _OWN_SETTINGS[self.name]}

    @model_validator(mode="before")
    @classmethod
    def _of_earlier_run_directories(cls, given: Any) -> Any:
        """Until November 2026 every run directory named the temperature that rloo samples at; it is 1."""
        if isinstance(given, dict) and given.get("sampling_temperature", 0) in (None, 1.0):
            return {key: value for key, value in given.items() if key != "sampling_temperature"}
        return given

    @model_validator(mode="after")
    def _fill_in(self) -> LossConfig:
        """Refuse what contradicts the loss or the preset, and fill in what they imply.

        What is filled in does not count as given (`model_fields_set`): a sweep over `loss.name` starts from what
        stands in the file.
        """
        given = {name for name in self.model_fields_set if getattr(self, name) is not None}
        if self.name == "sft" and self.orpo_lambda:
            raise ValueError(
                f"loss.name sft is λ = 0, but orpo_lambda is {self.orpo_lambda}: drop it, or use name: orpo"
            )
        own = _OWN_SETTINGS[self.name]
        for setting in sorted(given):
            readers = [name for name, settings in _OWN_SETTINGS.items() if setting in settings]
            if readers and setting not in own:
                raise ValueError(
                    f"loss.name {self.name} does not read {setting} ({getattr(self, setting)}), only "
                    f"{', '.join(readers)}: drop it, or use one of these; {self.name} reads {', '.join(own)}"
                )
        if self.name == "rloo" and self.reward_model is None:
            raise ValueError(
                "loss.name rloo needs loss.reward_model: a folder or hub name of a reward model; train one with "
                "loss.name: reward and write it with orpo-ray export"
            )
        if self.preset is not None and self.name not in ("orpo", "sft"):
            raise ValueError(
                f"preset {self.preset} says what an ORPO code base counts, but loss.name is {self.name}: "
                f"drop it and set {', '.join(_PRESETS[self.preset])}"
            )
        implied = _PRESETS[self.preset] if self.preset is not None else {}
        for setting in sorted(given & implied.keys()):
            if (value := getattr(self, setting)) != implied[setting]:
                raise ValueError(
                    f"preset {self.preset} sets {setting} to {implied[setting]}, but {setting} is {value}: drop one"
                )
        for setting, value in (own | implied).items():
            if setting not in given:
                object.__setattr__(self, setting, value)
        return self
