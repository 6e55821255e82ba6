"""The recipe: everything a run depends on, typed, frozen, and written down once.

A field's docstring is its only help text: the command line, the docs and the JSON schema read it.
A choice is a tagged union (`adapter: {kind: lora, rank: 8}`). Unknown keys are errors.
`compose.py` builds a recipe from layers; nothing changes one afterwards.
"""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from types import UnionType
from typing import Annotated, Any, ClassVar, Literal, Self, Union, get_args, get_origin

from pydantic import (
    AfterValidator,
    BaseModel,
    BeforeValidator,
    ConfigDict,
    Field,
    NonNegativeFloat,
    NonNegativeInt,
    PositiveFloat,
    PositiveInt,
    field_validator,
    model_validator,
)

Task = Literal["chat", "code", "instruct", "domain", "custom"]
Fraction = Annotated[float, Field(ge=0.0, le=1.0)]
Share = Annotated[float, Field(ge=0.0, lt=1.0)]


def _yaml_no(value: Any) -> Any:
    """YAML reads a bare `no` as false; where `no` is one of the words, it means the word."""
    return "no" if value is False else value


def _names(value: Any) -> Any:
    """One name, or several with commas between them, as the list that they mean."""
    return [name.strip() for name in value.split(",") if name.strip()] if isinstance(value, str) else value


def _seed(value: int) -> int:
    if value >= 2**32:
        raise ValueError("a seed has to be below 2**32, as numpy's generator takes no other")
    return value


Seed = Annotated[NonNegativeInt, AfterValidator(_seed)]

Names = Annotated[list[str], BeforeValidator(_names)]
"""A list of names; `a,b` and a single name count as one."""


class Section(BaseModel):
    """What every section shares: frozen, no unknown keys, docstrings as descriptions."""

    model_config = ConfigDict(
        frozen=True,
        extra="forbid",
        use_attribute_docstrings=True,
        protected_namespaces=(),
        allow_inf_nan=False,
    )


class Model(Section):
    """The model to start from and how it is loaded."""

    base: str = "tiny"
    """A folder, a Hub id, a finished run's folder, or `tiny` for the base model that ships with tunesmith."""

    revision: str | None = None
    """Branch, tag or commit of a Hub model."""

    dtype: Literal["auto", "float32", "float16", "bfloat16"] = "auto"
    """Type of the weights in memory. `auto`: float32 when they are trained in full, the checkpoint's own
    type for a frozen base on a GPU."""

    chat_template: str | None = None
    """A named template (`tunesmith show templates`) or a Jinja file, instead of the model's own. A model
    without a template gets `plain`."""

    attention: Literal["auto", "eager", "sdpa", "flash_attention_2"] = "auto"
    """Attention implementation; `auto` leaves the choice to transformers."""


class DataSource(Section):
    """One data set: where it is, how it is read, and its share in a mix."""

    dataset: str = "example:sql"
    """A file (.json .jsonl .csv .parquet .txt), a folder with train/eval files, a name of the catalogue
    (`tunesmith show catalog`), a Hub id, a URL of files in an object store (`s3://`, `gs://`, `hf://`), or
    `example:NAME`."""

    config: str | None = None
    """Configuration (subset) name of a Hub data set."""

    split: str | None = None
    """Take only this split of the source; by default all of its splits, each in its role."""

    data_files: str | None = None
    """File pattern inside a Hub data set, a folder or a URL."""

    revision: str | None = None
    """Branch, tag or commit of a Hub data set."""

    streaming: bool = False
    """Read a Hub data set row by row over the network, no more of it than `max_rows`, instead of
    downloading it first. Local files are always read piece by piece."""

    format: str = "auto"
    """How rows become examples (`tunesmith show formats`); `auto` decides by columns and says why."""

    input_text_key: str | None = None
    """Column that holds the question, for data with names of its own."""

    output_text_key: str | None = None
    """Column that holds the answer, for data with names of its own."""

    columns: dict[str, str] = {}
    """Columns to rename before rows are read, `{article: prompt, highlights: completion}`: what it is called
    in the data, and what it is called in the format."""

    prompt_prefix: str | None = None
    """Text put before every question: before the column `prompt`, or what `prompt_length` makes of `text`."""

    prompt_length: PositiveInt | None = None
    """Make questions of running text: the first N characters of the column `text` are asked with, the rest
    is the answer. Rows of no more than N characters are dropped."""

    max_rows: PositiveInt | None = None
    """Use only the first N rows of the source."""

    weight: PositiveFloat | None = None
    """Share of this data set in what is trained, relative to the weights of the others in `mix` (1 where a
    data set has none). Without any weight every row is trained once per epoch."""

    @model_validator(mode="before")
    @classmethod
    def _from_catalog(cls, given: Any) -> Any:
        """A name of the catalogue becomes what it stands for; fields that are given stay."""
        if not isinstance(given, dict) or "dataset" not in given:
            return given
        from tunesmith.catalog import resolved

        return resolved(given)


class Data(DataSource):
    """The examples: where they are, how they are read, mixed, split and cut."""

    mix: list[DataSource] = []
    """Further data sets, each with its own `dataset`, `format`, `max_rows`, `weight` and so on."""

    num_samples: PositiveInt | None = None
    """Training examples per epoch. Fewer than there are: that many are drawn, by content and `mix_seed`.
    More, in a mix with weights: rows are repeated."""

    mix_seed: Seed = 0
    """Seed of which rows are drawn where `num_samples` or weights leave some out."""

    system_prompt: str | None = None
    """System message put before every conversation that has none."""

    max_length: PositiveInt = 1024
    """Longest example in tokens; longer ones are treated as `over_long` says."""

    over_long: Literal["truncate", "truncate_answers", "drop", "error"] = "truncate"
    """What happens to an example above `max_length`: its end is cut, it is dropped, or the run stops.
    `truncate` never cuts away a whole answer: such a row is a breach of the supervision proof, unless
    `truncate_answers` allows it. Each case is counted in the ledger."""

    on_breach: Literal["stop", "drop"] = "stop"
    """What happens when a row fails the supervision proof (`docs/preparing.md`): the run stops before step 1 and
    names the rows, or they are dropped and counted."""

    packing: bool = False
    """Put several short examples into one row of `max_length` tokens, each attending to itself only: less
    padding, the same loss. `per_device_train_batch_size` then counts such rows."""

    validation: Share = 0.1
    """Share of the examples that picks the best checkpoint."""

    held_out: Share = 0.1
    """Share of the examples that neither training nor checkpoint choice sees; scores are measured on it."""

    group_by: str | None = None
    """Column whose equal values stay in one split (a conversation, a document, an author)."""

    near_duplicates: Literal["together", "ignore"] = "together"
    """Rows that are nearly the same text share a split. `ignore` looks at exact questions and groups only."""

    cache: bool = True
    """Keep the tokenized examples for the next run on the same rows, tokenizer, template and options."""


class MethodSection(Section):
    """What every method says of itself, as far as it decides which options have an effect."""

    can_pack: ClassVar[bool] = False
    """Whether several examples can share a row."""
    draws: ClassVar[bool] = False
    """Whether it learns from answers of the model, of which it keeps samples itself."""
    any_order: ClassVar[bool] = True
    """Whether its rows may come in any order."""


class SFT(MethodSection):
    """Supervised fine-tuning: imitate the answers."""

    kind: Literal["sft"] = "sft"

    can_pack: ClassVar[bool] = True

    loss_on: Literal["answers", "last_answer", "everything"] = "answers"
    """Tokens that are trained: all answers, only the last one, or the whole text. End-of-turn tokens of
    trained answers are always included."""

    neftune_noise_alpha: PositiveFloat | None = None
    """Noise on the input embeddings while training (NEFTune, arXiv 2310.05914); 5 is usual."""


class Seq2Seq(MethodSection):
    """Fine-tune an encoder-decoder model (T5, mT5, BART): the encoder reads the question, the decoder learns to
    write the answer."""

    kind: Literal["seq2seq"] = "seq2seq"

    source_prefix: str | None = None
    """Text put before every input, such as `summarize: `; it is saved with the model and used whenever it is
    asked. By default none, or that of the tuned run to start from."""

    max_input_length: PositiveInt | None = None
    """Longest input in tokens, special ones included. By default the 95th percentile of the training inputs,
    at most `data.max_length`. Longer inputs are treated as `data.over_long` says."""

    max_output_length: PositiveInt | None = None
    """Longest answer in tokens, its end-of-text token included. By default the 95th percentile of the training
    answers, at most `data.max_length`. A cut answer is taught no end."""

    loss_on: Literal["answers", "last_answer"] = "answers"
    """Answers of a conversation that are trained, each as a pair with all turns before it: all, or only the
    last one."""


class _Reference(MethodSection):
    """Fields of methods that hold the model to a reference: how likely it found each answer before."""

    loss_on: ClassVar[Literal["answers"]] = "answers"
    learning_rates: ClassVar[tuple[float, float]] = (1e-6, 1e-5)

    beta: PositiveFloat = 0.1
    """How closely the model is held to the reference: more keeps it closer. With the loss `ipo` it is the
    paper's tau."""

    reference: Literal["auto", "adapter_off", "copy", "precomputed"] = "auto"
    """Where the reference's likelihoods come from: the model with its adapter switched off, a second copy of the
    weights in memory, or one pass over the data before training. `auto`: the adapter off under LoRA and QLoRA, a
    copy where the weights themselves are trained, precomputed where the adapter's start changes the base."""

    reference_model: str | None = None
    """Another model as the reference, a folder, a run or a Hub id; its vocabulary has to be the same. By default
    the reference is the model before training."""

    @model_validator(mode="after")
    def _one_reference(self) -> Self:
        if self.reference_model and self.reference not in ("auto", "precomputed"):
            raise ValueError(f"reference {self.reference} has no effect beside a reference_model")
        return self


class DPO(_Reference):
    """Direct preference optimization (arXiv 2305.18290): of two answers, make the better one likelier than the
    worse one, measured against a reference."""

    kind: Literal["dpo"] = "dpo"

    loss: Literal[
        "sigmoid", "hinge", "ipo", "robust", "exo_pair", "nca_pair", "bco_pair", "sppo_hard", "aot",
        "aot_unpaired", "apo_zero", "apo_down", "discopop", "sigmoid_norm",
    ] = "sigmoid"  # fmt: skip
    """What is minimized. `sigmoid` is DPO's own, `ipo` aims at a fixed margin and does not run away on clean data
    (arXiv 2310.12036), `hinge` is SLiC's (2305.10425), `robust` expects a share of wrong labels (2403.00409),
    `exo_pair` 2402.00856, `nca_pair` 2402.05369, `bco_pair` 2404.04656, `sppo_hard` 2405.00675, `aot` 2406.05882,
    `apo_zero` and `apo_down` 2408.06266, `discopop` 2406.08414, `sigmoid_norm` per token (2411.15124)."""

    label_smoothing: Annotated[float, Field(ge=0.0, lt=0.5)] | None = None
    """Share of the pairs whose labels are expected to be the wrong way round, with the losses `robust` (0.1 by
    default), `exo_pair` (0.001) and `aot` (0). The others have no such term."""

    f_divergence: Literal["reverse_kl", "forward_kl", "js_divergence", "alpha_divergence"] = "reverse_kl"
    """Distance to the reference (f-DPO, arXiv 2309.16240). The others than `reverse_kl` fit the losses `sigmoid`,
    `sigmoid_norm`, `hinge`, `ipo`, `exo_pair`, `robust` and `discopop`."""

    divergence_alpha: PositiveFloat | None = None
    """Alpha of `alpha_divergence`, 0.5 by default."""

    sft_weight: NonNegativeFloat = 0.0
    """Weight of the imitation loss on the better answer beside it, per token (RPO, arXiv 2404.19733); it keeps
    good answers from becoming less likely together with the bad ones."""

    @model_validator(mode="after")
    def _fields_have_effect(self) -> Self:
        if self.label_smoothing is not None and self.loss not in (
            "robust",
            "exo_pair",
            "aot",
            "aot_unpaired",
        ):
            raise ValueError(
                f"label_smoothing has no effect with the loss {self.loss}; robust, exo_pair and aot have it"
            )
        if self.loss == "exo_pair" and self.label_smoothing == 0.0:
            raise ValueError("the loss exo_pair needs a label_smoothing above 0, such as 0.001")
        if self.divergence_alpha is not None and self.f_divergence != "alpha_divergence":
            raise ValueError(f"divergence_alpha has no effect with the f_divergence {self.f_divergence}")
        fits = ("sigmoid", "sigmoid_norm", "hinge", "ipo", "exo_pair", "robust", "discopop")
        if self.f_divergence != "reverse_kl" and self.loss not in fits:
            raise ValueError(f"the loss {self.loss} has no f_divergence; {', '.join(fits)} have")
        return self


class KTO(_Reference):
    """Kahneman-Tversky optimization (arXiv 2402.01306): make answers rated good likelier and those rated bad less
    likely than the reference finds them. Learns from ratings, and from preferences as two ratings each."""

    kind: Literal["kto"] = "kto"

    any_order: ClassVar[bool] = False

    loss: Literal["kto", "apo_zero_unpaired"] = "kto"
    """What is minimized: KTO's own, or APO-zero on single answers (arXiv 2408.06266), which estimates no KL."""

    desirable_weight: PositiveFloat | None = None
    """Weight of good answers. By default 1, or what brings the two kinds into balance as equation 8 of the paper
    asks: total weights of good to bad between 1 and 4/3."""

    undesirable_weight: PositiveFloat | None = None
    """Weight of bad answers; by default as above."""


class ORPO(MethodSection):
    """Odds ratio preference optimization (arXiv 2403.07691): imitate the better answer and make the worse one less
    likely in the same step, without a reference. Takes the place of supervised fine-tuning."""

    kind: Literal["orpo"] = "orpo"
    loss_on: ClassVar[Literal["answers"]] = "answers"
    learning_rates: ClassVar[tuple[float, float]] = (8e-6, 5e-5)

    beta: PositiveFloat = 0.1
    """Weight of the odds ratio beside the imitation loss (the paper's lambda)."""


class CPO(MethodSection):
    """Contrastive preference optimization (arXiv 2401.08417): DPO without a reference, beside an imitation loss on
    the better answer."""

    kind: Literal["cpo"] = "cpo"
    loss_on: ClassVar[Literal["answers"]] = "answers"
    learning_rates: ClassVar[tuple[float, float]] = (1e-6, 1e-5)

    loss: Literal["sigmoid", "hinge", "ipo"] = "sigmoid"
    """What is minimized of the difference in likelihood."""

    beta: PositiveFloat = 0.1
    """Scale of the difference; with `ipo` the paper's tau."""

    sft_weight: NonNegativeFloat = 1.0
    """Weight of the imitation loss on the better answer, per token."""

    label_smoothing: Annotated[float, Field(ge=0.0, lt=0.5)] = 0.0
    """Share of the pairs whose labels are expected to be the wrong way round, with the loss `sigmoid`."""

    @model_validator(mode="after")
    def _fields_have_effect(self) -> Self:
        if self.label_smoothing and self.loss != "sigmoid":
            raise ValueError(f"label_smoothing has no effect with the loss {self.loss}")
        return self


class SimPO(MethodSection):
    """Simple preference optimization (arXiv 2405.14734): make the better answer likelier per token than the worse
    one by a margin, without a reference."""

    kind: Literal["simpo"] = "simpo"
    loss_on: ClassVar[Literal["answers"]] = "answers"
    learning_rates: ClassVar[tuple[float, float]] = (1e-6, 1e-5)

    beta: PositiveFloat = 2.0
    """Scale of the difference in log-likelihood per token; the paper uses 2 to 10."""

    gamma: NonNegativeFloat = 1.0
    """Margin that is aimed at, on the scale of beta; the paper uses 0.3 to 1.6, about half of beta at 2."""

    sft_weight: NonNegativeFloat = 0.0
    """Weight of an imitation loss on the better answer, per token (CPO-SimPO)."""

    label_smoothing: Annotated[float, Field(ge=0.0, lt=0.5)] = 0.0
    """Share of the pairs whose labels are expected to be the wrong way round."""


class RewardModel(MethodSection):
    """Train a reward model: a score in place of the output layer, higher for the better of two answers
    (Bradley and Terry 1952, as in arXiv 2009.01325)."""

    kind: Literal["reward"] = "reward"
    loss_on: ClassVar[Literal["answers"]] = "answers"
    learning_rates: ClassVar[tuple[float, float]] = (1e-5, 1e-4)

    margin: Literal["auto", "none"] = "auto"
    """By how much the better answer's score is to be higher (arXiv 2307.09288, equation 2). `auto`: by what the
    column `margin` of a row says, where there is one; `none` leaves such a column out."""

    centering: NonNegativeFloat = 0.0
    """Weight of the squared sum of both scores, which keeps scores around 0 (arXiv 2312.09244, equation 2); 0.01 is
    usual. Good where scores are added to other rewards."""


class MetricReward(Section):
    """A metric of evaluation as a reward (`tunesmith show metrics`), computed from prompt, answer and reference."""

    kind: Literal["metric"] = "metric"

    name: str
    """Name of a metric that scores answers one by one. Where lower is better it counts against an answer."""

    weight: float = 1.0
    """What the reward is multiplied with in the sum of all rewards."""


class PythonReward(Section):
    """A function of the user's own: `(prompt, completion, reference) -> float`."""

    kind: Literal["python"] = "python"

    function: str
    """`module:function`, importable from the folder in which the command is run."""

    weight: float = 1.0
    """What the reward is multiplied with in the sum of all rewards."""


class ModelReward(Section):
    """A reward model: a sequence classifier with one output, which is the score of prompt and answer."""

    kind: Literal["model"] = "model"

    model: str
    """Folder or Hub id of the reward model, or the folder of the run that trained it."""

    batch_size: PositiveInt = 16
    """Answers per forward pass."""

    weight: float = 1.0
    """What the reward is multiplied with in the sum of all rewards."""


class JudgeReward(Section):
    """A language model behind an OpenAI-compatible endpoint that rates each answer from 1 to 10; the reward is its
    rating, brought to 0 to 1. Every answer costs a call."""

    kind: Literal["judge"] = "judge"

    base_url: str
    """Address of the endpoint up to and without `/chat/completions`, such as `http://127.0.0.1:8000/v1`. Other
    machines are asked over https only."""

    model: str
    """Name of the model as the endpoint knows it."""

    api_key_env: str | None = None
    """Name of the environment variable that holds the key. The key itself is never written anywhere."""

    rubric: str | None = None
    """What a good answer is, in a few sentences. By default: right, helpful, clear, and no longer than needed."""

    max_tokens: PositiveInt = 512
    """Longest reply of the judge."""

    concurrency: PositiveInt = 4
    """Calls under way at once."""

    timeout: PositiveFloat = 60.0
    """Seconds to wait for a reply."""

    retries: NonNegativeInt = 3
    """How often a call is repeated that failed or was not answered with a rating, before the run stops."""

    weight: float = 1.0
    """What the reward is multiplied with in the sum of all rewards."""


def _rewards(value: Any) -> Any:
    """Names of metrics and `module:function`, one or several, as the rewards that they mean."""
    if isinstance(value, str):
        value = [part.strip() for part in value.split(",") if part.strip()]
    if isinstance(value, Mapping):
        value = [value]
    if not isinstance(value, list | tuple):
        return value
    return [
        item
        if not isinstance(item, str)
        else {"kind": "python", "function": item}
        if ":" in item
        else {"kind": "metric", "name": item}
        for item in value
    ]


def _weighed(sections: list[Any]) -> list[Any]:
    if sections and not any(section.weight for section in sections):
        raise ValueError("every reward has weight 0, so there is nothing to learn; give one a weight")
    return sections


RewardSection = Annotated[
    MetricReward | PythonReward | ModelReward | JudgeReward, Field(discriminator="kind")
]
Rewards = Annotated[list[RewardSection], BeforeValidator(_rewards), AfterValidator(_weighed)]
"""Rewards with their weights; a plain name is a metric, `module:function` a function."""


class Rewarded(MethodSection):
    """What methods share that learn from what the model's own answers are worth."""

    loss_on: ClassVar[Literal["answers"]] = "answers"
    draws: ClassVar[bool] = True
    any_order: ClassVar[bool] = False

    rewards: Rewards = []
    """What answers are worth: names of metrics, `module:function`, or entries of a kind with its fields
    (`docs/rewards.md`). By default the metric on which the verdict rests."""

    max_new_tokens: PositiveInt = 256
    """Longest answer in tokens while training. A prompt that leaves no room for it within `data.max_length` is
    dropped."""

    temperature: PositiveFloat = 1.0
    """Temperature at which answers are drawn, and of the probabilities that are learned from."""


class Sampled(Rewarded):
    """What methods share that draw several answers to each prompt and compare their rewards with one another."""

    learning_rates: ClassVar[tuple[float, float]] = (1e-6, 1e-5)

    top_p: Annotated[float, Field(gt=0.0, le=1.0)] = 1.0
    """Draw from the smallest set of tokens with this much probability. Below 1 the probabilities that are learned from
    are not quite those that were drawn from."""

    num_iterations: PositiveInt = 1
    """Optimizer steps on each batch of answers."""

    epsilon: PositiveFloat = 0.2
    """How far the probability of a token may move from that at which it was drawn, as a ratio, and still gain."""

    epsilon_high: PositiveFloat | None = None
    """The same upwards (DAPO, arXiv 2503.14476, has 0.28); by default `epsilon`."""

    mask_cut_answers: bool = False
    """Leave answers that were cut at `max_new_tokens` out of the loss, instead of judging them as they are."""


class GRPO(Sampled):
    """Reinforcement learning from groups of answers (GRPO, arXiv 2402.03300): several answers to each prompt are drawn
    and scored, and those above their group's mean are made more likely. Batch sizes count answers."""

    kind: Literal["grpo"] = "grpo"

    num_generations: Annotated[int, Field(ge=2)] = 8
    """Answers drawn for each prompt. The batch size times the accumulation steps has to be a multiple of it; where it
    is not, the accumulation is raised, and the plan says so."""

    beta: NonNegativeFloat = 0.04
    """Cost of divergence from the model that training started from, per token; 0 neither computes nor limits it."""

    loss: Literal["grpo", "dapo", "dr_grpo", "bnpo", "cispo", "sapo"] = "dapo"
    """How the tokens' losses are added up and limited. `grpo`: mean by answer, then over answers; `dapo`: mean over
    all tokens; `dr_grpo`: by a constant length (arXiv 2503.20783), so that long wrong answers are not favoured; `bnpo`:
    mean over a batch's tokens; `cispo`, `sapo`: other limits than clipping (arXiv 2506.13585, 2511.20347)."""

    scale_rewards: Literal["group", "batch", "none"] = "group"
    """What advantages are divided by: the spread of their group, that of the whole batch (arXiv 2508.08221), or
    nothing, so that easy and hard prompts weigh by their spread (arXiv 2503.20783)."""

    importance: Literal["token", "sequence"] = "token"
    """Compare probabilities token by token, or of whole answers (GSPO, arXiv 2507.18071)."""


class RLOO(Sampled):
    """Reinforcement learning against the other answers' mean (RLOO, arXiv 2402.14740): each answer's advantage is its
    reward less the mean of the other answers to the same prompt; divergence is taken off the reward. Batch sizes
    count answers."""

    kind: Literal["rloo"] = "rloo"

    num_generations: Annotated[int, Field(ge=2)] = 4
    """Answers drawn for each prompt. The batch size times the accumulation steps has to be a multiple of it; where it
    is not, the accumulation is raised, and the plan says so."""

    beta: NonNegativeFloat = 0.05
    """What a nat of divergence from the model that training started from takes off an answer's reward; 0 neither
    computes nor limits it."""

    normalize_advantages: bool = False
    """Divide advantages by their spread over the batch."""

    reward_clip: PositiveFloat | None = None
    """Rewards are limited to plus and minus this."""


class PPO(Rewarded):
    """Reinforcement learning with a learned value (PPO, arXiv 1707.06347): the model answers prompts, rewards score the
    answers, and it learns from them. A training step is one rollout: `per_device_train_batch_size` times
    `gradient_accumulation_steps` prompts, answered once and learned from several times (`docs/ppo.md`)."""

    kind: Literal["ppo"] = "ppo"

    learning_rates: ClassVar[tuple[float, float]] = (3e-6, 3e-5)

    ppo_epochs: PositiveInt = 4
    """Passes over the answers of a rollout."""

    num_minibatches: PositiveInt = 1
    """Optimizer updates per pass: the answers are dealt into so many parts, anew in each pass."""

    kl_coefficient: NonNegativeFloat = 0.05
    """Cost of a nat of divergence from the model that training started from, token by token. With `kl_target` the
    coefficient to start with."""

    kl_target: PositiveFloat | None = None
    """Divergence to hold, in nats per answer, by adapting the coefficient after each rollout (Ziegler,
    arXiv 1909.08593). By default the coefficient stays."""

    kl_horizon: PositiveFloat = 10_000
    """Answers over which the coefficient adapts: smaller is faster. Used with `kl_target`."""

    kl_estimator: Literal["k1", "k3"] = "k1"
    """Estimate of the divergence that a token costs: the difference of log-probabilities, or one that is never
    negative and varies less."""

    gamma: Fraction = 1.0
    """Discount of later rewards, token by token."""

    lam: Fraction = 0.95
    """Weight of longer looks ahead in the advantage (GAE's lambda, arXiv 1506.02438)."""

    cliprange: PositiveFloat = 0.2
    """How far the probability of a token may move from the rollout's, as a ratio, and still gain."""

    cliprange_value: PositiveFloat | None = 0.2
    """How far a value may move from the rollout's and still gain; null: any way."""

    value_coefficient: PositiveFloat = 0.1
    """Weight of the value's loss beside the policy's."""

    entropy_coefficient: NonNegativeFloat = 0.0
    """Reward for the entropy of each token's distribution, against an early end of exploring."""

    whiten_rewards: bool = False
    """Divide the tokens' rewards by their spread over the rollout. Advantages are always whitened."""

    missing_eos_penalty: PositiveFloat | None = None
    """Taken off the score of an answer that was cut at `max_new_tokens` instead of ending."""

    value: Literal["trunk", "critic"] = "trunk"
    """What estimates the value of an unfinished answer: a linear head on the model's own last layer, or a model of its
    own, trained like the policy."""

    critic: str | None = None
    """Model that the critic starts from, such as a reward model's folder, with the same tokenizer; all of its
    weights are trained. By default the critic is a copy of the model, with the same weights trained. Used with
    `value: critic`."""

    value_learning_rate: PositiveFloat | None = None
    """Peak learning rate of the value head and the critic; by default `training.learning_rate`."""

    generation_batch_tokens: PositiveInt = 32_768
    """Tokens per batch while answering, padding included; a batch that does not fit is halved."""

    @model_validator(mode="after")
    def _has_effect(self) -> PPO:
        if self.critic and self.value != "critic":
            raise ValueError("method.critic has no effect with `value: trunk`; set method.value=critic")
        return self


class Full(Section):
    """Train every weight."""

    kind: Literal["full"] = "full"


class Freeze(Section):
    """Train the top layers; embeddings and bottom layers keep their weights."""

    kind: Literal["freeze"] = "freeze"

    ratio: Annotated[float, Field(gt=0.0, lt=1.0)] = 0.5
    """Share of the layers, counted from the bottom, that is frozen; of an encoder-decoder model in both halves."""


PRINCIPAL = ("pissa", "pissa_niter_16", "olora")
"""Starts of an adapter that are parts of the weight itself: a matrix has no more of them than its smaller side."""


class LoRA(Section):
    """Train low-rank updates of chosen weight matrices (arXiv 2106.09685)."""

    kind: Literal["lora"] = "lora"

    rank: PositiveInt = 8
    """Rank of each update."""

    alpha: PositiveInt | None = None
    """Scale of the update, divided by the rank; by default twice the rank."""

    dropout: Share = 0.1
    """Dropout on the adapter's input."""

    targets: Literal["attention", "query-value", "all-linear"] | Names = "attention"
    """Matrices that get an update: the attention projections, only query and value, every linear layer
    but the head, or module names. No match is an error."""

    bias: Literal["none", "all", "lora_only"] = "none"
    """Biases that are trained along."""

    modules_to_save: Names = []
    """Further modules trained in full and saved with the adapter, such as `embed_tokens`."""

    rank_stabilized: bool = False
    """Scale by alpha / sqrt(rank) instead of alpha / rank (rsLoRA, arXiv 2312.03732)."""

    dora: bool = False
    """Split each weight into magnitude and direction (DoRA, arXiv 2402.09353)."""

    init: Literal["default", "gaussian", "pissa", "pissa_niter_16", "olora", "orthogonal"] = "default"
    """Start of the update: zero (default, gaussian, orthogonal) or the weight's own principal parts
    (PiSSA, arXiv 2404.02948; OLoRA, arXiv 2406.01775)."""


class QLoRA(LoRA):
    """LoRA on a base quantized to 4 bits: nf4, double quantization, bfloat16 compute, on a CPU float32
    (arXiv 2305.14314)."""

    kind: Literal["qlora"] = "qlora"  # type: ignore[assignment]

    double_quantization: bool = True
    """Quantize the quantization constants as well."""


class Training(Section):
    """The optimization: how long, how fast, how often it is checked and saved."""

    num_epochs: PositiveFloat = 3
    """Passes over the training examples."""

    max_steps: PositiveInt | None = None
    """Stop after this many optimizer steps, whatever the epochs."""

    learning_rate: PositiveFloat = 5e-5
    """Peak learning rate."""

    scheduler: Literal[
        "linear",
        "cosine",
        "cosine_with_restarts",
        "polynomial",
        "constant",
        "constant_with_warmup",
        "inverse_sqrt",
    ] = "cosine"
    """Course of the learning rate after warm-up."""

    warmup_steps: NonNegativeInt = 100
    """Optimizer steps over which the learning rate rises. In a run too short for it the plan lowers it and
    says so."""

    weight_decay: NonNegativeFloat = 0.01
    """AdamW's weight decay; biases and norms are exempt."""

    max_grad_norm: NonNegativeFloat = 1.0
    """Gradients are scaled down to this norm; 0 switches it off."""

    optimizer: Literal[
        "adamw_torch",
        "adamw_torch_fused",
        "adafactor",
        "sgd",
        "adamw_bnb_8bit",
        "paged_adamw_8bit",
        "paged_adamw_32bit",
        "adamw_torch_8bit",
        "adamw_torch_4bit",
    ] = "adamw_torch_fused"
    """Optimizer. Those with `bnb` or `paged` need bitsandbytes, `adamw_torch_8bit` and `adamw_torch_4bit` torchao and
    CUDA (docs/gpu.md); paged ones move their states to the machine's memory when the GPU's runs out."""

    per_device_train_batch_size: PositiveInt = 4
    """Examples per forward pass and device."""

    per_device_eval_batch_size: PositiveInt = 8
    """Examples per forward pass and device when validating."""

    gradient_accumulation_steps: PositiveInt = 1
    """Forward passes per optimizer step."""

    batches: Literal["auto", "shuffled", "by_length"] = "auto"
    """Which rows come together: any, or rows of like length, drawn anew for each epoch, which leaves little padding.
    Not with packing, nor with kto and the methods that write their own answers. `auto`: of like length where the stock
    forward pads and that saves a twentieth of a batch; the fast one pads nothing."""

    gradient_checkpointing: bool = False
    """Recompute activations in the backward pass: less memory, about a third more time."""

    forward: Literal["fast", "stock"] = "fast"
    """How the model is run while it is trained: without padding, shared prompts once, the vocabulary only where a label
    is, where the model and the method allow it (docs/forward.md); or as transformers and TRL do."""

    kernels: Literal["torch", "liger"] = "torch"
    """Kernels of norms, rotary positions and gated layers on CUDA: torch's, or Liger's, which take fewer passes over
    memory (docs/gpu.md). Elsewhere torch's are used."""
    compile: bool = False
    """Compile the layers of the fast forward for the lengths as they change (torch.compile): some percent more speed
    after a minute or so of compilation. Without a compiler, with gradient_checkpointing and with the stock forward it
    is left out, and said."""

    cache_frozen: bool = False
    """Keep the outputs of frozen bottom layers (adapter.kind freeze) from epoch to epoch, in a quarter of the free
    memory at most. Refused where nothing below is frozen, or an adapter or dropout sits there, with noise, the stock
    forward and seq2seq, and with grpo, rloo and ppo, whose rows never come back."""

    mixed_precision: Annotated[Literal["no", "fp16", "bf16"], BeforeValidator(_yaml_no)] = "no"
    """Precision of the forward and backward pass; weights stay in their own type."""

    eval_steps: PositiveInt | Literal["epoch"] = 100
    """Validate every N optimizer steps, or after each epoch. The last step is always validated."""

    save_steps: PositiveInt | Literal["epoch"] = 500
    """Write a checkpoint every N optimizer steps, or after each epoch."""

    logging_steps: PositiveInt = 10
    """Record loss and speed every N optimizer steps."""

    save_total_limit: PositiveInt = 3
    """Checkpoints kept: the newest, then those with the lowest validation loss. The best model's stays in any case,
    and so does one with a file `pinned` in it."""

    load_best_model_at_end: bool = True
    """The final model is the best one by `best_by`, not the last one."""

    early_stopping_patience: PositiveInt | None = None
    """Stop after this many validations without a better one by `best_by`: by default without a lower loss."""

    num_workers: NonNegativeInt = 0
    """Processes that prepare batches."""

    seed: Seed = 42
    """Seed of everything random in the run; the data split does not depend on it."""

    eval_metrics: Names = []
    """Metrics (`tunesmith show metrics`) that each validation measures beside the loss, on `eval_samples` of the
    validation examples: another few answers every time, and curves in the report."""

    eval_samples: PositiveInt = 50
    """Validation examples that `eval_metrics` are measured on, chosen by content hash, the same ones every time."""

    best_by: str = "loss"
    """What makes a model the best one, and stops early: the validation loss, or a metric, which is then measured at
    each validation as well."""

    @property
    def compiles(self) -> bool:
        """Whether layers are compiled, where there is a compiler."""
        return self.compile and self.forward == "fast" and not self.gradient_checkpointing

    @property
    def measured(self) -> list[str]:
        """The metrics that each validation measures."""
        return list(dict.fromkeys([*self.eval_metrics, *([] if self.best_by == "loss" else [self.best_by])]))


class Server(Section):
    """An OpenAI-compatible server that has the models, for `evaluation.engine: openai`."""

    base_url: str = "http://127.0.0.1:8000/v1"
    """Address up to and without `/completions`. Other machines are asked over https only."""

    models: dict[str, str] = {}
    """Names under which the models are served, by the names of the rows: `{base: my-base, tuned: my-lora}`. A
    model that is not in it is asked for by its own: base, tuned, model, or a stage's."""

    api_key_env: str | None = None
    """Name of the environment variable that holds the key. The key itself is never written anywhere."""

    concurrency: PositiveInt = 16
    """Requests under way at once."""

    timeout: PositiveFloat = 300.0
    """Seconds to wait for an answer."""

    retries: NonNegativeInt = 5
    """How often a request that failed is repeated, each time after a longer wait, before the measurement stops."""

    def served(self, name: str) -> str:
        """What the server calls the model of the rows of this name."""
        return self.models.get(name, name)


class _OnRay(Section):
    """What is asked of Ray, for training and for answers alike."""

    workers: PositiveInt = 2
    """Workers, each a process with a GPU of its own where there are any."""

    address: str | None = None
    """Address of a cluster that runs, such as `auto` on one of its nodes; by default Ray is started on this machine
    and ended with the command."""

    cpus_per_worker: PositiveInt = 1
    """Processors that each worker takes."""

    device: Literal["auto", "cpu", "gpu"] = "auto"
    """What a worker computes on; `auto`: on a GPU where the cluster has any."""


class Shards(_OnRay):
    """Workers of Ray that share prompts, for `evaluation.engine: ray` (docs/ray.md)."""

    batch: PositiveInt = 64
    """Prompts that a worker is given at once."""


class Evaluation(Section):
    """How base and tuned model are compared on the held-out examples."""

    metrics: Names | None = None
    """Metrics to compute (`tunesmith show metrics`); by default those that fit the data. The first one that
    scores whole answers is the primary one, on which the verdict rests."""

    max_items: PositiveInt | None = 500
    """Answer at most this many held-out examples (chosen by content hash)."""

    max_new_tokens: PositiveInt = 256
    """Longest answer in tokens."""

    batch_tokens: PositiveInt = 8192
    """Tokens per generation batch, padding included."""

    samples: NonNegativeInt = 3
    """Answers shown before and after, and answers to as many validation prompts at each validation while training."""

    resamples: PositiveInt = 10_000
    """Bootstrap resamples behind each interval."""

    confidence: Annotated[float, Field(gt=0.5, lt=1.0)] = 0.95
    """Level of the intervals."""

    stages: bool = True
    """Where the base is a run, also measure the models that it was fine-tuned from: another set of answers each."""

    skip: bool = False
    """Train only; `tunesmith evaluate RUN` can follow later."""

    run_code: bool = False
    """Run the Python code that models write, in a sandbox, for pass_at_1 and the like (docs/running-code.md)."""

    attempts: PositiveInt = 1
    """Answers to each question: one greedy one, or several drawn at `attempts_temperature`, for pass@k."""

    forgetting: bool | None = None
    """Also measure base and tuned model on general texts that ship, to see what was forgotten; by default for the
    task domain. Both models are loaded once more."""

    attempts_temperature: Annotated[float, Field(gt=0, le=2)] = 0.8
    """Temperature of several attempts: low (0.2) for pass@1, high (0.8) for pass@10 and beyond."""

    seed: Seed = 0
    """What several attempts are drawn with; greedy answers need none."""

    engine: Literal["auto", "padded", "paged", "vllm", "openai", "ray"] = "auto"
    """What writes the answers, of base and tuned model alike (`docs/generation.md`). `padded`: batches of like length;
    `paged`: continuous batching; `vllm`: vLLM in this process; `openai`: a server; `ray`: padded, on several workers.
    `auto` is paged on CUDA, padded elsewhere."""

    engine_check: NonNegativeInt = 8
    """Answers of each model that are read again alone, to prove that the engine changes none; 0 leaves it out."""

    server: Server = Server()

    shards: Shards = Shards()


class Export(Section):
    """What happens to the finished model."""

    push_to_hub: bool = False
    """Upload the final model after training; the token comes from the Hub's own login."""

    hub_model_id: str | None = None
    """Repository to upload to, `owner/name`."""

    hub_private: bool = True
    """Create the repository as private."""


class Tracking(Section):
    """Experiment trackers that receive the metrics as well; none by default."""

    trackers: Annotated[
        list[Literal["tensorboard", "wandb", "mlflow", "trackio"]], BeforeValidator(_names)
    ] = []
    """Trackers by name."""

    project: str = "tunesmith"
    """Project name used by the trackers that have projects."""


class Local(Section):
    """Train in this process, or in those that a launcher has started."""

    kind: Literal["local"] = "local"


class Accelerate(Section):
    """Train in several processes of this machine, one for each device, started by torch's own launcher."""

    kind: Literal["accelerate"] = "accelerate"

    processes: PositiveInt | None = None
    """Processes that train together, by default one for each GPU. They share the rows of every step, so the batch
    and the result are those of one process."""


class Ray(_OnRay):
    """Train on the workers of Ray, on one machine or many; a worker that is lost is replaced, and the run goes on from
    its last checkpoint."""

    kind: Literal["ray"] = "ray"

    max_failures: NonNegativeInt = 3
    """How often lost workers are replaced before the run ends."""

    storage: str | None = None
    """Folder or URL (`s3://`, `gs://`, anything of fsspec) to which the run's folder is copied after each checkpoint,
    and from which it comes back when its node is lost. Workers on several nodes need an output folder that all of them
    see, with it as well."""

    dashboard: bool = False
    """Start Ray's dashboard with a Ray of this machine's own, for this machine only."""

    nodes: list[str] = []
    """Machines that are reached by SSH, the head first: with them the files of a cluster are written, as for SLURM, and
    the workers train there."""

    user: str | None = None
    """User of these machines; by default the one who writes the files."""

    setup: list[str] = []
    """Lines of shell that make ray and tunesmith known on these machines."""


class _Cluster(Section):
    """What the launchers of several nodes share."""

    nodes: PositiveInt = 1
    """Machines of the cluster."""

    processes_per_node: PositiveInt = 8
    """Processes on each, one for each of its GPUs."""


_SLURM_TIME = re.compile(
    r"\d+(:[0-5]?\d)?|\d+:[0-5]?\d:[0-5]?\d|\d+-\d+(:[0-5]?\d){0,2}|UNLIMITED", re.IGNORECASE
)
"""As `sbatch --time` takes it."""


class Slurm(_Cluster):
    """Write a batch script with which SLURM trains the recipe on nodes that share their folders."""

    kind: Literal["slurm"] = "slurm"

    time: str = "24:00:00"
    """Longest time of the job, as SLURM writes it; a run that it ends goes on when the job is submitted again."""

    partition: str | None = None
    """Partition of the cluster."""

    account: str | None = None
    """Account that is charged."""

    setup: list[str] = []
    """Lines of shell that make torchrun and tunesmith known on a node, such as `module load` and `source`."""

    @field_validator("time", mode="before")
    @classmethod
    def _is_slurm_time(cls, time: Any) -> Any:
        """`sbatch` would refuse it only on the cluster. YAML reads 12:00:00 without quotes as a number."""
        if not isinstance(time, str) or not _SLURM_TIME.fullmatch(time):
            raise ValueError(
                "a time of SLURM is text (in quotes): MINUTES, MM:SS, HH:MM:SS, D-HH, D-HH:MM or D-HH:MM:SS, such as "
                "'12:00:00' for 12 hours"
            )
        return time


class Kubernetes(_Cluster):
    """Write a TrainJob with which Kubeflow Trainer trains the recipe on Kubernetes."""

    kind: Literal["kubernetes"] = "kubernetes"

    image: str = "tunesmith:latest"
    """Container image with tunesmith and torch."""

    namespace: str = "default"
    """Namespace of the job."""

    runtime: str = "torch-distributed"
    """Training runtime of the cluster that starts torch on the nodes."""

    claim: str = "tunesmith-runs"
    """Persistent volume claim (ReadWriteMany) that holds runs and prepared data."""

    folder: str = "/runs"
    """Where the claim is mounted; the run's folder is made in it."""

    device: str = "nvidia.com/gpu"
    """What a process is given, by the cluster's name of it."""


Launch = Annotated[Local | Accelerate | Ray | Slurm | Kubernetes, Field(discriminator="kind")]


class DDP(Section):
    """Every process holds the whole model, and gradients are averaged after the backward pass."""

    kind: Literal["ddp"] = "ddp"


class FSDP(Section):
    """Each process holds a share of every weight, gradient and optimizer state, and gathers a layer when it is run
    (PyTorch's FSDP2). `training.gradient_checkpointing` and `training.mixed_precision` count as everywhere."""

    kind: Literal["fsdp"] = "fsdp"

    reshard_after_forward: bool = True
    """Give a layer's weights back after its forward pass and gather them again for the backward pass: less memory, half
    as much again to send. Without it only gradients and optimizer states are spread between passes."""

    cpu_offload: bool = False
    """Keep shares and optimizer states in the machine's memory, and take the optimizer's steps there: least memory of
    the GPU, much slower steps. On a CPU it changes nothing."""

    reduce_dtype: Literal["float32", "bfloat16"] = "float32"
    """Type in which gradients are summed over the processes under bf16: bfloat16 sends half as much and rounds more."""


class DeepSpeed(Section):
    """DeepSpeed's ZeRO: optimizer states (1), gradients too (2), weights too (3) are spread over the processes. Needs
    CUDA or a CPU, and the package."""

    kind: Literal["deepspeed"] = "deepspeed"

    stage: Literal[1, 2, 3] | None = None
    """What is spread; by default the lowest stage with which weights, gradients and states of one process take no more
    than half of its GPU."""

    offload_optimizer: bool = False
    """Keep the optimizer's states in the machine's memory and update the weights there."""

    offload_parameters: bool = False
    """Keep the weights in the machine's memory between their uses; stage 3 only."""

    @model_validator(mode="after")
    def _has_effect(self) -> Self:
        if self.offload_parameters and self.stage not in (None, 3):
            raise ValueError(
                f"offload_parameters is of ZeRO's stage 3, and parallel.stage is {self.stage}; give stage 3, or none"
            )
        return self


Parallel = Annotated[DDP | FSDP | DeepSpeed, Field(discriminator="kind")]

Method = Annotated[
    SFT | Seq2Seq | DPO | KTO | ORPO | CPO | SimPO | RewardModel | GRPO | RLOO | PPO,
    Field(discriminator="kind"),
]
Adapter = Annotated[Full | Freeze | LoRA | QLoRA, Field(discriminator="kind")]


class Recipe(Section):
    """Everything a run depends on."""

    task: Task = "custom"
    """What the model is tuned for; sets defaults and metrics."""

    preset: str | None = None
    """Preset that was applied, kept for the record."""

    name: str | None = None
    """Name of the run's folder; by default `<task>_<dataset>`."""

    output_dir: str = "./fine_tuned_models"
    """Folder in which the run's folder is made."""

    model: Model = Model()
    data: Data = Data()
    method: Method = SFT()
    adapter: Adapter = Full()
    training: Training = Training()
    evaluation: Evaluation = Evaluation()
    export: Export = Export()
    tracking: Tracking = Tracking()
    launch: Launch = Local()
    parallel: Parallel = DDP()

    @field_validator("name")
    @classmethod
    def _is_one_folder(cls, name: str | None) -> str | None:
        """Runs lie side by side in the output folder, where `tunesmith runs` finds them."""
        if name is not None and (name in (".", "..") or any(sign in name for sign in "/\\\0")):
            raise ValueError(
                "a run's name is that of one folder, without / and \\; output_dir says where it is made"
            )
        return name


@dataclass(frozen=True)
class FieldFact:
    """One field of the recipe, for everything that describes it: the docs, `--help`, `show recipe`."""

    path: str
    """Dotted path, as `--set` takes it: `adapter.rank`."""
    kind: str | None
    """The union's member that has the field, such as `lora`; None outside unions."""
    type: str
    default: Any
    about: str


def fields(section: type[BaseModel] = Recipe, path: str = "", kind: str | None = None) -> Iterator[FieldFact]:
    """Every field of the recipe with type, default and meaning, in the order of this file."""
    for name, field in section.model_fields.items():
        where = f"{path}.{name}" if path else name
        members = sections_of(field.annotation)
        for member in members:
            yield from fields(
                member, where, member.model_fields["kind"].default if field.discriminator else kind
            )
        if not members and name != "kind":
            yield FieldFact(
                where, kind, type_name(field.annotation), field.get_default(), field.description or ""
            )


def sections_of(annotation: Any) -> tuple[type[BaseModel], ...]:
    """The sections that a field's type allows: none for a plain value or a list, several for a union."""
    if get_origin(annotation) is list:
        return ()
    parts = get_args(annotation) or (annotation,)
    return tuple(p for p in parts if isinstance(p, type) and issubclass(p, BaseModel))


def type_name(annotation: Any) -> str:
    """A type as people write it: `a | b | number`."""
    origin = get_origin(annotation)
    if origin is Annotated:
        return type_name(get_args(annotation)[0])
    if origin is Literal:
        return " | ".join(str(value) for value in get_args(annotation))
    if origin in (Union, UnionType):
        return " | ".join(dict.fromkeys(type_name(part) for part in get_args(annotation)))
    if origin is dict:
        return "names and names"
    if origin is list:
        return f"list of {type_name(get_args(annotation)[0])}"
    names = {bool: "true | false", int: "whole number", float: "number", str: "text", type(None): "null"}
    return names.get(annotation, "data sources" if annotation is DataSource else "rewards")
