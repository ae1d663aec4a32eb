"""Takes a model's training step over, and gives it back."""

from __future__ import annotations

import inspect
from typing import Any

import keras

from kaccum.keras_private import asked_by, is_inside_fit
from kaccum.patches import Patch
from kaccum.window import Window


class Session:
    """A model whose gradients are accumulated.

    Args:
        model: A compiled `keras.Model` whose `train_function` is made.
    """

    def __init__(self, model: keras.Model) -> None:
        from kaccum.tensorflow import Engine

        self._model = model
        self._optimizer = model.optimizer
        self._window = Window(1)
        self._engine = Engine(model)
        self._get_plain_metrics = model.get_metrics_result
        self._make_plain = model.make_train_function
        self._train_function = Patch(
            model, "train_function", self._run_train_function
        )
        self._patches = [
            self._train_function,
            Patch(model, "make_train_function", self._make_train_function),
            Patch(model, "get_metrics_result", self._get_metrics_result),
        ]

    @classmethod
    def of(cls, model: keras.Model) -> Session:
        """The session of a model as it is compiled now.

        It is kept on the train function that it stands in for, so that a second
        fit compiles nothing anew and a recompiled model does.
        """
        plain = model.train_function
        kept = getattr(plain, "kaccum_session", None)
        if (
            isinstance(kept, Session)
            and kept._model is model
            and kept._optimizer is model.optimizer
        ):
            return kept
        session = cls(model)
        if inspect.isfunction(plain):
            vars(plain)["kaccum_session"] = session
        return session

    @property
    def is_installed(self) -> bool:
        """Whether the model is taken over."""
        return any(patch.is_installed for patch in self._patches)

    def take_over(self, window: Window) -> None:
        """Makes the model's next training steps accumulate.

        Args:
            window: Says when to update. Starts empty.
        """
        window.reset()
        self._window = window
        self._engine.start()
        for patch in self._patches:
            patch.install()

    def give_back(self) -> None:
        """Leaves the model as if it had never been taken over."""
        for patch in reversed(self._patches):
            patch.remove()
        self._engine.stop()

    def close_window(self) -> None:
        """Updates from a short window, if one is open."""
        if self._window.is_open:
            self._engine.update()
            self._window.reset()

    def _run_train_function(self, iterator: Any) -> Any:
        closes = self._window.closes(self._model.steps_per_execution)
        try:
            logs, ran = self._engine.run(iterator, closes)
        except self._engine.end_of_data:
            raise
        except BaseException:
            # `fit` ends here, without `on_train_end`.
            self.give_back()
            raise
        self._window.advance(ran)
        return logs

    def _get_metrics_result(self) -> Any:
        # The one call between an epoch's last batch and validation.
        if asked_by("fit", self._model):
            self.close_window()
        return self._get_plain_metrics()

    def _make_train_function(self, force: bool = False) -> Any:
        if not is_inside_fit(self._model):
            # A new `fit` or `train_on_batch`: ours ended without
            # `on_train_end`.
            self.give_back()
            return self._make_plain(force=force)
        if asked_by("train_on_batch", self._model):
            return self._lend_plain_function(force)
        if force:
            self._start_anew()
        return self._model.train_function

    def _start_anew(self) -> None:
        """Compiles again, as a callback that changed the model asks for."""
        self.close_window()
        self.give_back()
        self._make_plain(force=True)
        self._engine = type(self._engine)(self._model)
        self.take_over(self._window)

    def _lend_plain_function(self, force: bool) -> Any:
        """Gives the plain train function to a callback for a single call."""
        self._train_function.remove()
        self._make_plain(force=force)
        plain = self._model.train_function

        def run_once(iterator: Any) -> Any:
            self._model.train_function = plain
            self._train_function.install()
            return plain(iterator)

        self._model.train_function = run_once
        return run_once
