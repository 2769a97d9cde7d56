"""The gate: what a client's reply must be before a strategy sees it, be it ours, Flower's or a user's.

    it was asked for, once -> no error -> counts are counts -> names, shapes, dtypes -> values are finite

(`messages.complaint` checks one reply; an engine that folds calls it where replies are summed up.) A reply
that does not pass is kept back, and its client and the reason are in `Replies.refused`. Size and depth of
what comes over a wire are looked at before that, in `fedsim/wire.py`.

Flower's strategies end the run when replies differ in their records or metrics: they get what all have.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

from flwr.app import Message, MetricRecord, RecordDict

from fedsim import _flwr, messages
from fedsim.errors import listed
from fedsim.messages import Replies, Roster, Shapes


def admit(
    replies: Iterable[Message],
    asked: Mapping[int, Shapes | None],
    who: Roster,
    weight: str = messages.EXAMPLES,
) -> Replies:
    """The good replies, in the order in which clients were asked; the others are named in `refused`.

    Args:
        replies: of one exchange.
        asked: client -> arrays that its reply must have (None: any that are finite).
        who: which node is which client.
        weight: name of the metric that replies are weighted with.
    """
    good: dict[int, Message] = {}
    refused: dict[int, str] = {}
    left = set(asked)
    for client, message in messages.by_client(replies, who):
        reason: str | None = "it was not asked, or it answered twice"
        if client in left:
            left.remove(client)
            reason = messages.complaint(message, asked[client], weight)
        if reason is None:
            good[client] = message
        else:
            refused[client] = reason
    admitted = Replies(good[client] for client in asked if client in good)
    admitted.refused = refused
    return admitted


def alike(replies: Replies, clients: Sequence[int]) -> tuple[Replies, dict[str, str]]:
    """The same replies with the records and the metrics alone that all of them have, in one form.

    Args:
        replies: that were admitted.
        clients: whose they are.

    Returns:
        The replies, and what was left out: name -> who differs, in words.
    """
    contents = {client: _flwr.data_of(m.content) for client, m in zip(clients, replies, strict=True)}
    records, odd = _common({c: {k: type(r).__name__ for k, r in own.items()} for c, own in contents.items()})
    metrics = {}
    for key in records:
        own = {client: content[key] for client, content in contents.items()}
        if all(isinstance(record, MetricRecord) for record in own.values()):
            forms = {client: {k: _form(v) for k, v in record.items()} for client, record in own.items()}
            metrics[key], more = _common(forms)
            odd |= more
    if not odd:
        return replies, {}
    out = Replies(_with(message, records, metrics) for message in replies)
    out.refused = replies.refused
    return out, odd


def _common(forms: Mapping[int, Mapping[str, str]]) -> tuple[list[str], dict[str, str]]:
    """Names that all clients have in one form, and who differs in the others."""
    common, odd = [], {}
    for name in dict.fromkeys(name for own in forms.values() for name in own):
        found = {client: own.get(name, "nothing") for client, own in forms.items()}
        usual = Counter(found.values()).most_common(1)[0][0]
        others = [client for client, form in found.items() if form != usual]
        if others:
            said = listed((f"client {client} sends {found[client]}" for client in others), most=3)
            odd[name] = f"{said}, the others {usual}"
        else:
            common.append(name)
    return common, odd


def _form(value: Any) -> str:
    return f"a list of {len(value)}" if isinstance(value, list) else "a number"


def _with(message: Message, records: Iterable[str], metrics: Mapping[str, Iterable[str]]) -> Message:
    content: Mapping[str, Any] = message.content
    kept = RecordDict({key: content[key] for key in records})
    for key, names in metrics.items():
        kept[key] = MetricRecord({name: content[key][name] for name in names})
    return _flwr.with_content(message, kept)
