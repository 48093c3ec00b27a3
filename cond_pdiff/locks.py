"""Locks that keep one thread at a time where models have state: attached adapters, a scheduler's steps, a tokenizer's settings, loading."""

from __future__ import annotations

import contextlib
import queue
import threading
from collections.abc import Callable, Generator, Iterator
from typing import Any, TypeVar
from weakref import WeakKeyDictionary

LOADING = threading.RLock()
"""The lock held while a model is loaded: diffusers and transformers change torch for the whole process while they do it."""

Loaded = TypeVar("Loaded")
Step = TypeVar("Step")
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


def in_one_thread(begin: Callable[[], Generator[Step, None, None]]) -> Iterator[Step]:
    """Yield what the generator of `begin()` yields, which runs in a thread of its own from its first step to its last.

    A lock belongs to the thread that took it. A generator that holds one between its steps, as a language model's answer under an
    adapter does, must not be driven by now this thread and now that, as web servers do. It may run ahead of the caller; where the caller
    stops early (closes this one), it stops after the step that it is at. What it raises is raised here.
    """
    told: queue.SimpleQueue[tuple[bool, Any]] = queue.SimpleQueue()
    stopped = threading.Event()

    def run() -> None:
        try:
            with contextlib.closing(begin()) as steps:
                for step in steps:
                    told.put((True, step))
                    if stopped.is_set():
                        return
            told.put((False, None))
        except BaseException as error:
            told.put((False, error))

    threading.Thread(target=run, daemon=True).start()
    try:
        going, value = told.get()
        while going:
            yield value
            going, value = told.get()
        if value is not None:
            raise value
    finally:
        stopped.set()
