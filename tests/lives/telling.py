"""The story of a life by its twin."""

from __future__ import annotations

import torch

from tests.lives.actions import Action, Life
from tests.lives.seen import Seen
from tests.lives.twin import Twin


def twin_of(life: Life) -> Twin:
    if life.setting.engine == "deepspeed":
        return Twin(life)
    from tests.lives.megatron_twin import MegatronTwin

    return MegatronTwin(life)


def tell(life: Life) -> tuple[Life, list[Seen]]:
    """The life with its actions made legal, and what is to be seen at its start and after each of them."""
    state = torch.get_rng_state()
    twin = twin_of(life)
    actions: list[Action] = []
    seen = [twin._seen([], "")]
    for wish in life.actions:
        done = twin.play(wish)
        if done is not None:
            actions.append(done[0])
            seen.append(done[1])
    torch.set_rng_state(state)
    return Life(life.seed, life.setting, tuple(actions)), seen
