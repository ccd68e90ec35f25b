"""Finds the weights in the content of a checkpoint: under which key, averaged or not, with which prefix."""

import re
from collections import deque
from collections.abc import Iterator, Mapping
from typing import Any, NamedTuple

from ssaseg.cli.weights.stand_ins import Array, Inert
from ssaseg.files.text import printable

# Keys that hold weights, the first that is found; others are taken after these. Averaged weights come before all.
USUAL = ("state_dict", "model", "model_state_dict", "network", "net", "params", "weights", "module")
AVERAGED = re.compile(r"(^|[^a-z])(ema|swa|avg|average|averaged)([^a-z]|$)", re.IGNORECASE)
# Keys whose tensors are not weights.
NOT_WEIGHTS = re.compile(
    r"optim|sched|scaler|callback|message_hub|loops|^(meta|args|cfg|config|hparams|hyper_parameters)$", re.IGNORECASE
)
# Wrappers of modules. Their names stand before all keys; those of the second kind also between the parts of a key.
PREFIXES = ("module.", "_orig_mod.", "model.", "net.", "network.")
BETWEEN = re.compile(r"(?<![^.])(_orig_mod|_fsdp_wrapped_module|_checkpoint_wrapped_module)\.")
COUNTERS = ("n_averaged", "steps")  # of averages, beside the prefixed keys
DEEPEST = 3  # keys above the weights, as in model.state_dict
SHARE = 0.5  # of the largest group's tensors, that the weights must have: a few numbers are not a network
LISTED = 8  # how many keys an error lists
MOST_VISITED = 100_000  # entries that are counted for an error


class Group(NamedTuple):
    """Tensors that stand together under one key."""

    keys: tuple[str, ...]  # the keys above them; () at the top
    tensors: Mapping[Any, Any]

    @property
    def name(self) -> str:
        """For messages."""
        return printable(".".join(key[:60] for key in self.keys)) or "top level"

    @property
    def averaged(self) -> bool:
        """Whether a key above says so."""
        return any(AVERAGED.search(key) for key in self.keys)


class Found(NamedTuple):
    """The weights in a checkpoint, by key without prefix."""

    tensors: dict[str, Array | Inert]
    name: str  # of the group
    notes: list[str]  # phrases for the user: what was taken, what was removed


def find_weights(content: Any) -> Found | None:
    """The weights in a checkpoint, or None. Averaged ones if there are any, then the usual keys, then the most tensors.

    A group with less than half as many tensors as the largest is not taken.
    """
    groups = list(_groups(content))
    if not groups:
        return None
    least = SHARE * max(len(group.tensors) for group in groups)
    large = [group for group in groups if len(group.tensors) >= least]
    averages = [group for group in large if _is_average(group, content)]
    best = min(averages or large, key=lambda group: (_rank(group), -len(group.tensors)))
    notes = []
    # An average that has too few tensors is named too.
    others = [
        group for group in groups if len(group.tensors) >= least or (not averages and _is_average(group, content))
    ]
    named = ", ".join([group.name for group in others if group is not best][:LISTED])
    if averages and named:
        notes.append(f"the averaged weights, not those in {named}")
    elif named:
        notes.append(f"not those in {named}")
    tensors, prefix = without_prefix({str(key): value for key, value in best.tensors.items()})
    return Found(tensors, best.name, [*notes, *prefix_note(prefix)])


def prefix_note(prefix: str) -> list[str]:
    """Says that prefixes were removed, if there were any."""
    return [f"without the prefix {prefix}"] if prefix else []


def _is_average(group: Group, content: Mapping[Any, Any]) -> bool:
    """Whether a group has averaged weights.

    mmengine saves the average as `state_dict` and the raw weights as `ema_state_dict` (`EMAHook`).
    """
    if "message_hub" in content and "ema_state_dict" in content:
        return group.keys == ("state_dict",)
    return group.averaged


def _rank(group: Group) -> int:
    """The place in `USUAL`, of the key nearest to the tensors that is one of these; the top level comes last."""
    places = [USUAL.index(key) for key in reversed(group.keys) if key in USUAL]
    return places[0] if places else len(USUAL) + (not group.keys)


def _groups(content: Any) -> Iterator[Group]:
    """All mappings with tensors in them, except those below keys that never hold weights; each once."""
    waiting: deque[tuple[tuple[str, ...], Any]] = deque([((), content)])
    seen: set[int] = set()  # a mapping may be there under many keys
    while waiting:
        keys, mapping = waiting.popleft()
        if not isinstance(mapping, Mapping) or id(mapping) in seen:
            continue
        seen.add(id(mapping))
        tensors = {key: value for key, value in mapping.items() if is_tensor(value)}
        if tensors:
            yield Group(keys, tensors)
        if len(keys) < DEEPEST:
            inner = {str(key): value for key, value in mapping.items() if isinstance(value, Mapping)}
            waiting.extend(((*keys, key), value) for key, value in inner.items() if not NOT_WEIGHTS.search(key[:100]))


def is_tensor(value: Any) -> bool:
    """Whether it is a tensor of any kind."""
    return isinstance(value, Array) or (isinstance(value, Inert) and value.is_tensor)


def without_prefix(tensors: Mapping[str, Any]) -> tuple[dict[str, Any], str]:
    """The tensors without the prefixes that all keys have, one after the other, and these prefixes as one text.

    The keys stay as they are where two would become equal. Counters of averages are left out with the prefix.
    """
    shorter = {key: key for key in tensors if key not in COUNTERS}
    removed = ""
    while shorter:
        prefix = next((each for each in PREFIXES if all(key.startswith(each) for key in shorter.values())), None)
        if prefix is None:
            break
        shorter = {key: value.removeprefix(prefix) for key, value in shorter.items()}
        removed += prefix
    inner = {key: BETWEEN.sub("", value) for key, value in shorter.items()}
    if inner != shorter and len(set(inner.values())) == len(inner):
        removed += (" and " if removed else "") + next(
            found[0] for key in shorter.values() if (found := BETWEEN.search(key))
        )
        shorter = inner
    if not removed:
        return dict(tensors), ""
    return {value: tensors[key] for key, value in shorter.items()}, removed


def list_content(content: Any) -> str:
    """The keys of a checkpoint, each with the number of tensors below it."""
    if not isinstance(content, Mapping):
        return "no keys"
    counts = {printable(str(key)[:60]): count_tensors(value) for key, value in list(content.items())[:LISTED]}
    more = f" and {len(content) - LISTED} more" if len(content) > LISTED else ""
    return (", ".join(f"{key} ({count} tensors)" for key, count in counts.items()) or "no keys") + more


def count_tensors(value: Any) -> int:
    """Tensors at and below a value; of a huge content, those among the first entries."""
    waiting, count, visited = [value], 0, 0
    seen: set[int] = set()  # a container may contain itself
    while waiting and visited < MOST_VISITED:
        each = waiting.pop()
        visited += 1
        count += is_tensor(each)
        if isinstance(each, Mapping | list | tuple) and id(each) not in seen:
            seen.add(id(each))
            waiting.extend(each.values() if isinstance(each, Mapping) else each)
    return count
