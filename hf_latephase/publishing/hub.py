"""What a trainer does on the Hub beyond Trainer: uploads that lack nothing, and errors that say what to do."""

from __future__ import annotations

import contextlib
import glob
import os
import shutil
from collections.abc import Iterator
from concurrent.futures import Future
from pathlib import Path
from typing import Any

from huggingface_hub import constants
from huggingface_hub.errors import OfflineModeIsEnabled
from transformers import Trainer
from transformers.utils import GENERATION_CONFIG_NAME, logging

from ..compat import CONNECTION_ERRORS, REFUSAL, TrainerHooks
from ..config import CONFIG_NAME
from ..core.averaging import TimeAverage
from ..core.late_phase import LatePhase
from .trainer_card import Record, write_model_card


logger = logging.get_logger(__name__)


class Publishing:
    """
    Completes what Trainer uploads while it trains, and explains uploads that failed.

    From a checkpoint, Trainer copies the weights, the config and the tokenizer into the folder that it uploads, but
    neither the code of the model nor a card; of an upload in the background that failed it says nothing.

    Args:
        trainer (`transformers.Trainer`):
            The trainer.
    """

    def __init__(self, trainer: Trainer) -> None:
        self._trainer = trainer
        self._checkpoint: str | None = None

    @contextlib.contextmanager
    def checkpoint(self, folder: str) -> Iterator[None]:
        """Context in which the parent may upload the model of a checkpoint, in the background."""
        earlier = self._jobs()
        self._checkpoint = folder
        try:
            with self.explained():
                yield
        finally:
            self._checkpoint = None
        for job in self._jobs():
            if job not in earlier:
                job.add_done_callback(self._report)

    def begin(self) -> None:
        """Completes the folder that is about to be uploaded; the parent has decided that it will be."""
        if self._checkpoint is None:
            return  # push_to_hub saves everything itself
        trainer, output_dir = self._trainer, self._trainer.args.output_dir
        assert output_dir is not None  # TrainingArguments has filled it in
        settings = [os.path.join(self._checkpoint, name) for name in (CONFIG_NAME, GENERATION_CONFIG_NAME)]
        for path in settings + glob.glob(f"{glob.escape(self._checkpoint)}/*.py"):
            if os.path.isfile(path):
                shutil.copy(path, output_dir)
        trainer.create_model_card(model_name=(trainer.args.hub_model_id or Path(output_dir).name).split("/")[-1])

    @contextlib.contextmanager
    def explained(self, has_saved: bool = True) -> Iterator[None]:
        """
        Context that adds the remedy to an error of the Hub's client.

        Args:
            has_saved (`bool`, defaults to `True`):
                Whether the model has been saved by the time that something can fail.
        """
        try:
            yield
        except Exception as error:
            remedy = _remedy(error)
            if remedy is not None and not getattr(error, "__notes__", None):
                error.add_note(f"{remedy} {self._what_is_left()}" if has_saved else remedy)
            raise

    def _jobs(self) -> list[Future]:
        push = getattr(self._trainer, "push_in_progress", None)
        return list(push.jobs) if push is not None else []

    def _report(self, job: Future) -> None:
        error = None if job.cancelled() else job.exception()
        if error is not None:
            remedy = _remedy(error) or ""
            logger.error(
                f"An upload to {self._trainer.hub_model_id} failed, training goes on: {error!r}. {remedy} "
                f"{self._what_is_left()}"
            )

    def _what_is_left(self) -> str:
        folder = self._trainer.args.output_dir
        return f"What was saved in {folder!r} is untouched: trainer.push_to_hub() uploads it."


class PublishingMixin(TrainerHooks):
    """The part of [`LatePhaseMixin`] that writes model cards and uploads."""

    late_phase: LatePhase
    time_average: TimeAverage | None
    control_results: dict[str, dict[str, float]]
    _publishing: Publishing

    def init_hf_repo(self, token: str | None = None, private: bool | None = None) -> None:
        """Creates the parent's repository on the Hub, if there is none."""
        with self._publishing.explained(has_saved=False):
            super().init_hf_repo(token, **_given(private))

    def create_model_card(
        self,
        language: str | None = None,
        license: str | None = None,
        tags: str | list[str] | None = None,
        model_name: str | None = None,
        finetuned_from: str | None = None,
        tasks: str | list[str] | None = None,
        dataset_tags: str | list[str] | None = None,
        dataset: str | list[str] | None = None,
        dataset_args: str | list[str] | None = None,
    ) -> None:
        """
        Writes the model card, `README.md` in `output_dir`: Trainer's metadata, and what was replicated and averaged.

        A parent class with cards of its own (TRL's), and an adapter, keep theirs and get our section below.

        Args:
            language, license, tags, model_name, finetuned_from, tasks, dataset_tags, dataset, dataset_args:
                As in [`~transformers.Trainer.create_model_card`].
        """
        options = {
            "language": language,
            "license": license,
            "tags": tags,
            "model_name": model_name,
            "finetuned_from": finetuned_from,
            "tasks": tasks,
            "dataset_tags": dataset_tags,
            "dataset": dataset,
            "dataset_args": dataset_args,
        }
        write_model_card(self, self._record(), super().create_model_card, options)

    def _record(self) -> Record:
        return Record(
            self.late_phase,
            getattr(self, "_points", None),
            None if self.time_average is None else self.time_average.num_averaged,
            self.control_results,
        )

    def push_to_hub(
        self,
        commit_message: str | None = "End of training",
        blocking: bool = True,
        token: str | None = None,
        revision: str | None = None,
        private: bool | None = None,
        **kwargs: Any,
    ) -> Any:
        """
        Uploads the averaged model as [`~transformers.Trainer.push_to_hub`] does, with its card, code and config.

        Args:
            commit_message, blocking, token, revision, private, kwargs:
                As in the parent's. TRL's `dataset_name` is `dataset`.

        Raises:
            `huggingface_hub.errors.HfHubHTTPError`: If the Hub refuses; a note says what to do. `output_dir` holds
                all that was to be uploaded, and calling again uploads it.
        """
        if "dataset_name" in kwargs:
            kwargs["dataset"] = kwargs.pop("dataset_name")
        with self._publishing.explained():
            return super().push_to_hub(commit_message, blocking, token, revision, **_given(private), **kwargs)

    def _push_from_checkpoint(self, checkpoint_folder: str) -> None:
        with self._publishing.checkpoint(checkpoint_folder):
            super()._push_from_checkpoint(checkpoint_folder)


def _remedy(error: BaseException) -> str | None:
    """What to do about an error of the Hub's client, or of what it was caused by; `None` if it is another error."""
    if isinstance(error, OfflineModeIsEnabled):
        return "Unset HF_HUB_OFFLINE to publish."
    if isinstance(error, REFUSAL):
        if error.response.status_code in (401, 403):
            return (
                "The Hub did not get a token that may write there: log in with `hf auth login`, set HF_TOKEN, or pass "
                "hub_token in TrainingArguments."
            )
        return "The Hub refused, or broke off."
    if isinstance(error, CONNECTION_ERRORS):
        return f"The Hub at {constants.ENDPOINT} cannot be reached: check the network, and HF_ENDPOINT if it is set."
    return _remedy(error.__cause__) if error.__cause__ is not None else None


def _given(private: bool | None) -> dict[str, bool]:
    """The argument, if there is a value: before transformers 5.23 there is no such argument."""
    return {} if private is None else {"private": private}
