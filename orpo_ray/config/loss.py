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
"""The tokens that TRL 1.16's ORPOTrainer, LLaMA-Factory's `pref_loss: orpo` and the authors' xfactlab/orpo count."""

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
"""Loss -> the settings that it reads but not every loss does, with their defaults: those of TRL 1.16, or for simpo
those of its authors."""


class LossConfig(Section):
    """The objective, and every choice that changes what its numbers mean.

    orpo is L = NLL + orpo_lambda * L_OR (paper eq. 6). A setting that the chosen loss does not read is null; giving
    it a value is an error.
    """

    name: Literal["orpo", "sft", "dpo", "cpo", "simpo", "ipo", "reward", "rloo"] = "orpo"
    """The objective. `sft` is the NLL alone: exactly λ = 0. dpo and ipo compare with a reference model, the model that
    training starts from; dpo, ipo and simpo have no NLL in their objective but report it. `reward` trains a reward
    model instead of a language model (Bradley-Terry, paper eq. 11). `rloo` is RLHF: it samples two answers to each
    prompt, scores them with `reward_model`, and raises the probability of the better one (Ahmadian et al. 2024, with a
    KL penalty)."""
    preset: Literal["trl", "llamafactory", "authors"] | None = None
    """Count tokens as another ORPO code base does: sets `nll_scope`, `nll_reduction`, `nll_eos` and `answer_padding`.
    TRL and the authors average the token means of micro-batches; orpo_ray takes the mean over the global batch. Their
    numbers are therefore reproduced if the batch is one micro-batch on one worker; otherwise λ keeps its meaning."""
    orpo_lambda: float | None = Field(None, ge=0)
    """orpo, sft: the paper's λ (`beta` in TRL, `alpha` in the authors' code); 0.1 by default, 0 for sft."""
    ratio: Literal["odds", "probability"] | None = None
    """orpo: compare the odds P / (1 - P) of the answers (default) or, as in the paper's ablation, P itself."""
    temperature: float | None = Field(None, gt=0)
    """orpo: factor of the log ratio inside the sigmoid (`b` of arXiv 2502.01237); 1 by default, as in the paper."""
    beta: float | None = Field(None, gt=0)
    """dpo, cpo, simpo: factor of the log ratio of the answers; ipo: τ, whose target for the log ratio is 1 / (2τ);
    rloo: penalty per nat of KL divergence from the model that training starts from. 0.1 by default, 2 for simpo, 0.05
    for rloo."""
    simpo_gamma: float | None = Field(None, ge=0)
    """simpo: target margin between the rewards, TRL's `simpo_gamma`; 0.5 by default."""
    nll_weight: float | None = Field(None, ge=0)
    """cpo: weight of the NLL, TRL's `cpo_alpha`; 1 by default. TRL's NLL counts the response only."""
    reward_model: str | None = Field(None, min_length=1)
    """rloo: folder or hub name of the reward model, e.g. one that `orpo-ray export` wrote from a run with
    `name: reward`."""
    max_new_tokens: int | None = Field(None, ge=1)
    """rloo: maximum length of a sampled answer, in tokens; 128 by default."""
    nll_scope: Literal["prompt_and_response", "response"] = "prompt_and_response"
    """Tokens of [prompt | chosen] that the NLL counts."""
    nll_reduction: Literal["token", "pair"] = "token"
    """`token`: mean over all counted tokens of the global batch; `pair`: mean over pairs of each pair's token mean."""
    nll_eos: bool = True
    """Whether EOS tokens count in the NLL, including those inside the prompt. They always count in the answers' mean
    log-probabilities."""
    answer_padding: bool = False
    """Whether the first padding token (an EOS) after an answer counts as one more token in its mean log-probability, as
    in the authors' code, whose mask is off by one."""

    @property
    def needs_reference(self) -> bool:
        """Whether the loss compares with a reference model's log-probabilities."""
        return self.name in ("dpo", "ipo")

    @property
    def is_reward(self) -> bool:
        """Whether a reward model is trained, whose outputs are rewards instead of log-probabilities."""
        return self.name == "reward"

    @field_validator("reward_model")
    @classmethod
    def _local_path_is_absolute(cls, path: str | None) -> str | None:
        return path and absolute_if_local(path)

    @property
    def own_settings(self) -> dict[str, Any]:
        """The settings that this loss reads but not every loss does, with their values."""
        return {setting: getattr(self, setting) for setting in _OWN_SETTINGS[self.name]}

    @model_validator(mode="before")
    @classmethod
    def _without_sampling_temperature(cls, given: Any) -> Any:
        """Read run directories from before November 2026, which all name rloo's sampling temperature; it is 1."""
        if isinstance(given, dict) and given.get("sampling_temperature", 0) in (None, 1.0):
            return {key: value for key, value in given.items() if key != "sampling_temperature"}
        return given

    @model_validator(mode="after")
    def _fill_in(self) -> LossConfig:
        """Refuse settings that contradict the loss or the preset, and fill in those that they imply.

        Settings filled in do not count as given (`model_fields_set`): a sweep over `loss.name` starts from the settings
        in the file.
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
                f"preset {self.preset} sets what an ORPO code base counts, but loss.name is {self.name}: "
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
