"""Locks that keep one thread at a time where models have state: attached adapters, a scheduler's steps, a tokenizer's settings, loading."""

from __future__ import annotations

import threading
from collections.abc import Callable
from typing import TypeVar
from weakref import WeakKeyDictionary

LOADING = threading.RLock()
"""The lock held while a model is loaded: diffusers and transformers change torch for the whole process while they do it."""

Loaded = TypeVar("Loaded")
# Beside the objects, not on them: those are copied, pickled and saved.
_locks: WeakKeyDictionary[object, threading.RLock] = WeakKeyDictionary()
_registry = threading.Lock()


def lock_of(owner: object) -> threading.RLock:
    """Return the lock inside which a thread has the model or tokenizer to itself: no other thread's adapter is on it.

    It is re-entrant: what holds it may call what takes it. Everything in this package that attaches an adapter, or runs a model that
    adapters are attached to, takes the lock of that model. Coroutines of one thread share it, so they do not await anything inside.
    A thread may take a pipeline's lock (its U-Net's), then a base model's, then a tokenizer's, never the other way round.

    Args:
        owner: the module that adapters are attached to (see `adapted_module`), a pipeline's U-Net, or a tokenizer.
    """
    with _registry:
        return _locks.setdefault(owner, threading.RLock())


def load_once(loaded: list[Loaded], load: Callable[[], Loaded]) -> Loaded:
    """Return what the list holds, loaded into it on first use, by one thread alone."""
    if not loaded:
        with LOADING:
            if not loaded:
                loaded.append(load())
    return loaded[0]
