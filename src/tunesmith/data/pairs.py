"""Pairs for encoder-decoder models: what the encoder reads, and what the decoder learns to write.

A pair is kept as one row of tokens like any other example: first the input, without loss, then the answer,
every token of it labelled. `parted` takes the two apart where a batch is made, so that the ledger, the
cache, the plan and `inspect` need not know about pairs.

The input is text as it stands, behind `source_prefix` if there is one, opened and closed by the special
tokens that the tokenizer itself puts there. That form is written down as the tokenizer's chat template and
saved with the model, so that whoever asks it later feeds it the same tokens.
"""

from __future__ import annotations

import json
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from tunesmith.data import BATCH, EncodedSplits, Splits, batched, cache, stored, supervision
from tunesmith.data.examples import (
    Conversation,
    Example,
    LedgerEntry,
    Message,
    Row,
    Unusable,
)
from tunesmith.data.splitting import TRAIN
from tunesmith.data.templates import (
    IGNORED,
    Encoder,
    Encoding,
    LossOn,
    as_message,
    asked_whole,
    encoder,
    has_special_text,
    left_out,
    plain_ids,
    set_template,
)
from tunesmith.errors import DataError, ModelError, counted, does
from tunesmith.recipe import Data, Seq2Seq

MARK = "{#- input of an encoder-decoder model, by tunesmith -#}"
"""How a template of ours is known again."""

TURNS = (
    "{%- for message in messages if message.role == 'system' -%}"
    "{{- message.content + '\\n\\n' -}}"
    "{%- endfor -%}"
    "{%- set turns = messages | rejectattr('role', 'equalto', 'system') | list -%}"
    "{%- for message in turns -%}"
    "{%- if turns | length == 1 -%}{{- message.content -}}"
    "{%- else -%}{{- message.role + ': ' + message.content + ('' if loop.last else '\\n') -}}{%- endif -%}"
    "{%- endfor -%}"
)
"""A single question as it is; several turns as lines that name who speaks; a system message above them."""

PERCENTILE = 95
"""Share of the training pairs, in percent, that fit the lengths where none are given."""


@dataclass(frozen=True)
class Lengths:
    """Most tokens of an input and of an answer, special tokens included."""

    input: int
    output: int
    note: str
    """Where they come from, in a sentence."""


def settle_template(tokenizer: Any, choice: str | None, prefix: str | None = None) -> str:
    """Settle how an input is written, and say so in a sentence.

    `choice` is a chat template by name or file; by default the model's own, or else text as it stands behind
    `prefix`. Raises ModelError where the tokenizer has no token that ends an answer, and where a prefix
    would have no place in the template.
    """
    if tokenizer.eos_token_id is None:
        raise ModelError(
            "The tokenizer has no end-of-text token, so no answer could end.",
            fix="Set eos_token in tokenizer_config.json.",
        )
    own = tokenizer.chat_template
    ours = isinstance(own, str) and own.startswith(MARK)
    if choice or (own and not ours):
        if prefix:
            raise ModelError(
                "method.source_prefix has no place where a chat template writes the input.",
                found="model.chat_template" if choice else "the model's own chat template",
                fix="Leave the prefix out, or write it into a Jinja file and give that as --chat-template.",
            )
        return set_template(tokenizer, choice)
    if ours and prefix is None:
        return "The input is written as the tuned model has it; that is saved with the final model."
    opening, closing = _special_ends(tokenizer)
    literals = [json.dumps(text, ensure_ascii=False) for text in (opening + (prefix or ""), closing)]
    tokenizer.chat_template = f"{MARK}{{{{- {literals[0]} -}}}}{TURNS}{{{{- {literals[1]} -}}}}"
    said = f"behind {prefix!r}" if prefix else "as it stands"
    return (
        f"The encoder reads the text {said}, as the tokenizer opens and closes it; that is saved with the "
        "final model."
    )


def _special_ends(tokenizer: Any) -> tuple[str, str]:
    """The special tokens that the tokenizer puts before and behind a text."""
    bare, whole = (
        tokenizer("a", add_special_tokens=with_special).input_ids for with_special in (False, True)
    )
    for at in range(len(whole) - len(bare) + 1):
        if whole[at : at + len(bare)] == bare:
            tokens = tokenizer.convert_ids_to_tokens(whole)
            return "".join(tokens[:at]), "".join(tokens[at + len(bare) :])
    return "", ""


def prompt_ids(messages: Sequence[Message], tokenizer: Any) -> list[int]:
    """What the encoder reads when the model is asked. Raises Unusable where the template refuses."""
    [ids] = asked_whole([messages], encoder(tokenizer))
    if isinstance(ids, Unusable):
        raise ids
    return ids


def encode(example: Example, tokenizer: Any, *, loss_on: LossOn = "answers") -> Encoding:
    """The pair of an example's last answer, uncut. Raises Unusable with the reason."""
    [(_, [pairs])] = encode_batches([[example]], encoder(tokenizer), loss_on="last_answer")
    if isinstance(pairs, Unusable):
        raise pairs
    [pair] = pairs
    return Encoding(tuple(pair.input_ids.tolist()), tuple(pair.labels.tolist()))


def encode_rows(
    batches: Iterable[Sequence[Example]], context: Encoder, *, loss_on: LossOn
) -> Iterator[tuple[Sequence[Example], list[Encoding | Unusable]]]:
    """Each batch with one encoding for each example: its pairs one behind the other."""
    for batch, found in encode_batches(batches, context, loss_on=loss_on):
        yield batch, [item if isinstance(item, Unusable) else _in_line(item) for item in found]


def _in_line(pairs: Sequence[Encoding]) -> Encoding:
    return Encoding(
        np.concatenate([pair.input_ids for pair in pairs]), np.concatenate([pair.labels for pair in pairs])
    )


def encode_batches(
    batches: Iterable[Sequence[Example]], context: Encoder, *, loss_on: LossOn
) -> Iterator[tuple[Sequence[Example], list[list[Encoding] | Unusable]]]:
    """Each batch with the pairs of each example, uncut, or the reason why it has none."""
    for batch in batches:
        asked = [_questions(example, context, loss_on) for example in batch]
        flat = [pair for item in asked if not isinstance(item, Unusable) for pair in item]
        sources = iter(asked_whole([question for question, _ in flat], context))
        targets = iter(target_ids([answer for _, answer in flat], context))
        found: list[list[Encoding] | Unusable] = []
        for item in asked:
            if isinstance(item, Unusable):
                found.append(item)
                continue
            made = [(next(sources), next(targets)) for _ in item]
            refused = next((source for source, _ in made if isinstance(source, Unusable)), None)
            found.append(refused or [_joined(s, t) for s, t in made if not isinstance(s, Unusable)])
        yield batch, found


def _questions(
    example: Example, context: Encoder, loss_on: LossOn
) -> list[tuple[tuple[Message, ...], str]] | Unusable:
    """The answers to learn, each behind all turns before it."""
    if not isinstance(example, Conversation):
        return Unusable(f"a {type(example).__name__.lower()} has no question for the encoder to read")
    if not context.takes_tools and (example.tools or any(m.tool_calls for m in example.messages)):
        return Unusable("the input has no place for tools")
    found = [
        (example.messages[:place], message)
        for place, message in enumerate(example.messages)
        if message.role == "assistant" and any(m.role != "system" for m in example.messages[:place])
    ]
    if not found:
        return Unusable("the conversation has no answer to a question")
    chosen = found[-1:] if loss_on == "last_answer" else found
    trained = [
        (question, m.content) for question, m in chosen if m.trained is not False and m.content.strip()
    ]
    if not trained:
        return Unusable("empty answer" if not chosen[-1][1].content.strip() else "the row trains no answer")
    try:
        for _, answer in trained:
            answer.encode("utf-8")
    except UnicodeEncodeError as error:
        return Unusable(f"character {error.start + 1} of the answer is half a character")
    return trained


def target_ids(answers: Sequence[str], context: Encoder) -> list[list[int]]:
    """Ids that the decoder is to write for each answer, the end-of-text token last; special-token text in an
    answer stays text."""
    if not answers:
        return []
    tokenizer = context.tokenizer
    found: list[list[int]] = tokenizer(text_target=list(answers), split_special_tokens=True).input_ids
    for number, (answer, ids) in enumerate(zip(answers, found, strict=True)):
        if context.specials.marked(answer) != answer:
            frame = tokenizer(text_target="").input_ids  # all that is put around an answer
            opening = next(
                (n for n, (a, b) in enumerate(zip(ids, frame, strict=False)) if a != b), len(frame)
            )
            ids = found[number] = [*frame[:opening], *plain_ids(answer, tokenizer), *frame[opening:]]
        if tokenizer.eos_token_id not in ids[-2:]:  # mBART puts the language behind it
            ids.append(tokenizer.eos_token_id)
    return found


def _joined(source: Sequence[int], target: Sequence[int]) -> Encoding:
    ids = np.array([*source, *target], dtype=np.int32)
    labels = ids.copy()
    labels[: len(source)] = IGNORED
    return Encoding(ids, labels)


def parted(input_ids: Sequence[int], labels: Sequence[int]) -> tuple[list[int], list[int]]:
    """Input and answer of a pair."""
    length = next((n for n, label in enumerate(labels) if label != IGNORED), len(labels))
    return list(input_ids[:length]), list(labels[length:])


def lengths(splits: Splits, context: Encoder, data: Data, section: Seq2Seq) -> Lengths:
    """The lengths given, or those that hold 95 % of the training pairs.

    Where longer rows are refused or dropped (`data.over_long`), that is left to `data.max_length`.
    """
    given = (section.max_input_length, section.max_output_length)
    if given[0] and given[1]:
        return Lengths(
            given[0], given[1], f"inputs have up to {given[0]} tokens, answers up to {given[1]}: as given"
        )
    if data.over_long in ("drop", "error"):
        found = (data.max_length, data.max_length)
        why = f"data.max_length, since longer ones are not cut (over_long: {data.over_long})"
    else:
        counted: tuple[list[int], list[int]] = ([], [])
        for _, encodings in encode_batches(
            batched(splits.examples(TRAIN), BATCH), context, loss_on=section.loss_on
        ):
            for item in encodings:
                for pair in () if isinstance(item, Unusable) else item:
                    counted[0].append(len(pair.input_ids) - pair.trained)
                    counted[1].append(pair.trained)
        if not counted[0]:
            found = (data.max_length, data.max_length)
        else:
            at = [int(np.percentile(numbers, PERCENTILE)) for numbers in counted]
            found = (min(at[0], data.max_length), min(at[1], data.max_length))
        why = f"the {PERCENTILE}th percentile of {len(counted[0])} training pairs, at most data.max_length"
    chosen = (given[0] or found[0], given[1] or found[1])
    said = [
        f"{name} have up to {length} tokens: {'as given' if asked else why}"
        for name, length, asked in zip(("inputs", "answers"), chosen, given, strict=True)
    ]
    return Lengths(*chosen, note="; ".join(said))


def cut_off(encoding: Encoding, limits: Lengths, closing: int) -> Any:
    """Which tokens of pairs in line are cut off, as booleans: the end of an input before its `closing`
    special tokens, and the end of an answer, so that no false end is taught."""
    labels = np.asarray(encoding.labels)
    is_answer = labels != IGNORED
    cut = np.zeros(len(labels), dtype=bool)
    starts = np.flatnonzero(np.concatenate(([True], is_answer[1:] != is_answer[:-1])))
    for begin, end in zip(starts, [*starts[1:], len(labels)], strict=True):
        if is_answer[begin]:
            cut[begin + limits.output : end] = True
        elif end - begin > limits.input:
            kept_end = min(closing, limits.input)
            cut[begin + limits.input - kept_end : end - kept_end] = True
    return cut


def cut_to(encoding: Encoding, length: int | None, tokenizer: Any) -> tuple[Encoding, int]:
    """A pair with input and answer of at most `length` tokens each, and how many tokens are cut."""
    if length is None or len(encoding.input_ids) <= length:
        return encoding, 0
    closing = closing_tokens(tokenizer, encoder(tokenizer))
    kept = ~cut_off(encoding, Lengths(length, length, ""), closing)
    ids, labels = np.asarray(encoding.input_ids)[kept], np.asarray(encoding.labels)[kept]
    return Encoding(tuple(ids.tolist()), tuple(labels.tolist())), int((~kept).sum())


def cutter(splits: Splits, tokenizer: Any, data: Data, section: Seq2Seq) -> Callable[[Encoding], Any]:
    """Says of an encoding which of its tokens training would cut off."""
    context = encoder(tokenizer)
    limits, closing = lengths(splits, context, data, section), closing_tokens(tokenizer, context)
    return lambda encoding: cut_off(encoding, limits, closing)


def closing_tokens(tokenizer: Any, context: Encoder) -> int:
    """Number of special tokens behind every input."""
    ids = prompt_ids((Message("user", "a"),), tokenizer)
    return next((n for n, i in enumerate(reversed(ids)) if i not in context.specials.ids), 0)


def encoded(splits: Splits, tokenizer: Any, *, data: Data, section: Seq2Seq) -> EncodedSplits:
    """Token ids and labels of all splits as pairs, cut as the lengths say, each cut in the ledger.

    Every training row has passed the supervision proof. Raises DataError where there is no training row,
    where the recipe refuses over-long examples, and where a row fails the proof and may not be dropped.
    """
    return stored(
        splits,
        tokenizer,
        data,
        {"method": section.model_dump(mode="json")},
        lambda folder: _encode_into(folder, splits, tokenizer, data=data, section=section),
    )


def _encode_into(
    folder: Any, splits: Splits, tokenizer: Any, *, data: Data, section: Seq2Seq
) -> dict[str, Any]:
    """Write the splits; the facts about them."""
    context, counts = encoder(tokenizer), Counter[str]()
    limits, closing = lengths(splits, context, data, section), closing_tokens(tokenizer, context)
    proof = PairProof(context, rows=len(splits.fates))
    too_long: list[str] = []
    refuses = data.over_long in ("drop", "error")
    waiting: list[list[tuple[int, Row, Example | None]]] = []

    def examples() -> Iterator[list[Example]]:
        for batch in batched(splits.rows(), BATCH):
            waiting.append(batch)
            yield [example for _, _, example in batch if example is not None]

    with cache.SplitsWriter(folder) as written:
        for _, found in encode_batches(examples(), context, loss_on=section.loss_on):
            rows, each = waiting.pop(0), iter(found)
            entries = [splits.entry(number, row) for number, row, _ in rows]
            kept: list[tuple[int, Example, list[Encoding]]] = []
            for place, (_, _, example) in enumerate(rows):
                if example is None:
                    continue
                entry, pairs = entries[place], next(each)
                counts["special"] += has_special_text(example, context)
                counts["left_out"] += left_out(example, context)
                if isinstance(pairs, Unusable):
                    entries[place] = entry._replace(fate="dropped", reason=str(pairs))
                    continue
                unknown = tokenizer.unk_token_id
                counts["unknown"] += unknown is not None and any(unknown in p.input_ids for p in pairs)
                entry = entries[place] = entry._replace(tokens=sum(len(pair.input_ids) for pair in pairs))
                if entry.fate == "held_out":
                    written.hold_out(example)
                    continue
                masks = [cut_off(pair, limits, closing) for pair in pairs]
                if refuses and any(mask.any() for mask in masks):
                    reason = (
                        f"longer than {limits.input} tokens of input or {limits.output} of answer "
                        f"(over_long: {data.over_long})"
                    )
                    entries[place] = entry._replace(fate="dropped", reason=reason)
                    too_long.append(f"{entry.row} ({entry.tokens} tokens)")
                else:
                    kept.append((place, example, pairs))
            breaches = proof.check(
                [rows[place][0] for place, _, _ in kept],
                [example for _, example, _ in kept],
                [_in_line(pairs) for _, _, pairs in kept],
            )
            encodings: list[tuple[int, LedgerEntry, list[Encoding]]] = []
            for (place, _, pairs), breach in zip(kept, breaches, strict=True):
                entry = entries[place]
                if breach:
                    entries[place] = entry._replace(fate="dropped", reason=breach)
                    continue
                cut, lost = _cut(pairs, limits, closing)
                if any(lost):
                    entries[place] = entry._replace(tokens_cut=sum(lost), reason=_said(*lost, limits))
                    counts["answers_cut"] += bool(lost[1])
                encodings.append((rows[place][0], entry, cut))
            written.write(entries, encodings)
    if too_long and data.over_long == "error":
        raise DataError(
            f"{len(too_long)} examples are longer than {limits.input} tokens of input or {limits.output} of answer.",
            found=", ".join(too_long[:10]),
            fix="Raise method.max_input_length and method.max_output_length (or --max-length), or choose "
            "data.over_long truncate or drop.",
        )
    proof.finish(on_breach=data.on_breach)
    facts = written.facts(rows=len(splits.fates), fix="Mend the rows that the reasons name.")
    return {
        **facts,
        "proof": proof.as_dict(),
        "notes": [limits.note, *_notes(facts["counts"], counts)],
        "lengths": [limits.input, limits.output],
    }


def _cut(pairs: Sequence[Encoding], limits: Lengths, closing: int) -> tuple[list[Encoding], tuple[int, int]]:
    """The pairs cut to the lengths, and how many tokens their inputs and their answers lose."""
    cut, of_input, of_answer = [], 0, 0
    for pair in pairs:
        mask = cut_off(pair, limits, closing)
        is_answer = pair.labels != IGNORED
        of_input += int((mask & ~is_answer).sum())
        of_answer += int((mask & is_answer).sum())
        cut.append(Encoding(pair.input_ids[~mask], pair.labels[~mask]))
    return cut, (of_input, of_answer)


def _said(of_input: int, of_answer: int, limits: Lengths) -> str:
    """What a row loses, for the ledger."""
    parts = [f"{of_input} tokens of the input (at most {limits.input})"] * bool(of_input)
    parts += [f"{of_answer} tokens of the answer (at most {limits.output})"] * bool(of_answer)
    return "cut: " + " and ".join(parts)


def _notes(totals: Mapping[str, int], counts: Mapping[str, int]) -> list[str]:
    said = [
        (counts["special"], "contain", "the text of a special token; it is kept as plain text"),
        (counts["left_out"], "have", "reasoning, for which the input has no place: it is left out"),
        (
            counts["unknown"],
            "have",
            "characters that the tokenizer does not know: the model reads or writes its unknown token there",
        ),
        (totals["truncated"], "are", "cut to the lengths"),
        (counts["answers_cut"], "lose", "the end of an answer; no end is taught there"),
    ]
    return [f"{counted(count, 'row')} {does(word, count)} {text}" for count, word, text in said if count]


CHECKS = {
    "trained_tokens": "every row has a trained token",
    "end_of_turn": "the end-of-text token of every answer has a label",
    "padding": "no label is padding, which would be left out of the loss",
    "read_tokens": "the encoder reads more than special tokens",
    "prompt": "a row's input is what the encoder is fed when the model is asked",
}


class PairProof(supervision.Proof):
    """The supervision proof for pairs: checks on ids and labels, batch by batch.

    No answer is lost as a whole: lengths count for each answer on its own, and each keeps its beginning.
    """

    def __init__(self, context: Encoder, *, rows: int) -> None:
        super().__init__(context, loss_on="answers", max_length=0, may_cut_answers=True, rows=rows)
        self.checked = dict.fromkeys(CHECKS, 0)

    def check(
        self, numbers: Sequence[int], examples: Sequence[Example], encodings: Sequence[Encoding]
    ) -> list[str | None]:
        """Why each row of uncut pairs fails, None where it is right. `numbers` are the rows' running numbers."""
        tokenizer = self.context.tokenizer
        found: list[str | None] = []
        for number, example, encoding in zip(numbers, examples, encodings, strict=True):
            ids, labels = np.asarray(encoding.input_ids), np.asarray(encoding.labels)
            trained = labels != IGNORED
            failed = {"trained_tokens": not trained.any()}
            # Each run of labels is an answer: the token before its end, or the end itself, closes it.
            ends = np.flatnonzero(trained & ~np.concatenate((trained[1:], [False])))
            closed = [tokenizer.eos_token_id in labels[max(end - 1, 0) : end + 1] for end in ends]
            failed["end_of_turn"] = not all(closed)
            pad = tokenizer.pad_token_id
            failed["padding"] = pad != tokenizer.eos_token_id and bool((labels == pad).any())
            failed["read_tokens"] = not (set(ids[~trained].tolist()) - self.context.specials.ids)
            for name, wrong in failed.items():
                self.checked[name] += 1
                if wrong:
                    break
            else:
                wrong = False
            if not wrong and number % self.step == 0:
                self.checked["prompt"] += 1
                name, wrong = "prompt", not self._is_asked(example, encoding)
            reason = self._reason(name) if wrong else None
            if reason:
                self._count(reason, example.row)
            found.append(reason)
        return found

    def _reason(self, name: str) -> str:
        return {
            "trained_tokens": "no token is trained",
            "whole_answers": "a whole answer is cut away",  # asked for by `finish`, and never so
            "end_of_turn": "an answer has no label on its end-of-text token",
            "padding": "an answer has the padding token in it, which is left out of the loss",
            "read_tokens": "the input is empty: the encoder would read nothing",
            "prompt": "the input's tokens are not those that the encoder is fed when asked",
        }[name]

    def _is_asked(self, example: Example, encoding: Encoding) -> bool:
        """Whether the last trained pair's input is that of its question, as both paths ask it."""
        if not isinstance(example, Conversation):
            return True
        ids, labels = encoding.input_ids.tolist(), encoding.labels.tolist()
        target_end = len(labels)
        target = next((n for n in range(target_end, 0, -1) if labels[n - 1] == IGNORED), 0)
        source = next((n for n in range(target, 0, -1) if labels[n - 1] != IGNORED), 0)
        places = [
            n for n, m in enumerate(example.messages) if m.role == "assistant" and m.trained is not False
        ]
        turns = [n for n in places if example.messages[n].content.strip()]
        question = example.messages[: turns[-1]]
        if [ids[source:target]] != asked_whole([question], self.context):
            return False
        if not has_special_text(example, self.context):
            served = self.context.tokenizer.apply_chat_template(
                [as_message(turn, self.context) for turn in question],
                add_generation_prompt=True,
                return_dict=False,
            )
            self.served_otherwise += list(served) != ids[source:target]
        return True

    def as_dict(self) -> dict[str, Any]:
        """What was checked on how many rows, and what failed."""
        breaches = [
            {"reason": reason, "rows": count, "first": [str(row) for row in self.breaches[reason]]}
            for reason, count in self.counts.items()
        ]
        return {
            "checks": [
                {"name": name, "about": about, "rows": self.checked[name]} for name, about in CHECKS.items()
            ],
            "breaches": breaches,
            "served_otherwise": self.served_otherwise,
        }
