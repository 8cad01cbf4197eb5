"""`TreeRolloutScheduler`: trees inside ``swift rollout``, with the hooks that users override."""
from __future__ import annotations

import asyncio
import copy
import dataclasses
import random
import time
import traceback
from collections import Counter
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any, Iterator, Sequence

from swift.infer_engine.protocol import ChatCompletionResponseChoice, RequestConfig, RolloutInferRequest, RolloutOutput
from swift.rollout import MultiTurnScheduler
from swift.utils import get_logger
from tqdm import tqdm

from .config import ConfigError, TreeConfig
from .engine import EngineError, Prompt, SegmentEngine, VllmSegmentEngine, check_request_config
from .grouping import Group, group_requests, prompt_key
from .hooks import HookError, HookRunner
from .outputs import OutputWriter, RolloutError, RolloutFailure
from .policies.stopping import TextChecker
from .search import Limits, Segment, SegmentRequest, TreeSearch, check_policies, text_verdict
from .tasks import Rendezvous, all_or_cancel
from .text import PathReader
from .transport import REPORT_KEY, REQUEST_KEY, RequestNote
from .tree import Path, StopReason, response_ids

logger = get_logger()

SWIFT_PLACEHOLDER = [{'role': 'user', 'content': '<placeholder>'}]
"""What swift sends to a server that has no requests this time, to ignore the answer."""


@dataclass(slots=True)
class _Grove:
    """One tree while it grows: its requests' positions in the batch, its prompt and its search."""

    group: Group
    request: RolloutInferRequest
    note: RequestNote
    prompt: Prompt
    search: TreeSearch


def _shares_budget(grove: _Grove) -> bool:
    return grove.search.config.budget == 'by_segment_tokens'


class TreeRolloutScheduler(MultiTurnScheduler):
    """Grows the answers to a prompt as one tree (TreePO, arXiv 2508.17445); single-turn.

    The smallest useful subclass overrides one hook::

        class StopAtCode(TreeRolloutScheduler):

            def check_segment(self, path, text):
                return StopReason.HOOK if text.count('```') >= 2 else super().check_segment(path, text)
    """
    def __init__(self,
                 infer_engine: Any = None,
                 max_turns: int | None = None,
                 *args: Any,
                 segment_engine: SegmentEngine | None = None,
                 **kwargs: Any) -> None:
        """swift passes `infer_engine`; give a `segment_engine` instead to run on an engine of your own."""
        super().__init__(infer_engine, max_turns, *args, **kwargs)
        if type(self).step is not MultiTurnScheduler.step:
            raise NotImplementedError(f'{type(self).__name__}.step: TreeRolloutScheduler is single-turn in this '
                                      'version and would never call it.')
        self._default = TreeConfig.load()
        self.config = self._default
        self._engine = VllmSegmentEngine(infer_engine) if segment_engine is None and infer_engine else segment_engine
        self._hooks = HookRunner()
        self._reader: PathReader | None = None
        self._warned: set[str] = set()
        self._cpu_seconds = 0.0

    # Override these. They may be plain or async functions; a plain one runs in a thread of its own.

    def check_segment(self, path: Path, text: str) -> StopReason | None:
        """Called at every segment boundary: return a reason (`StopReason.HOOK` is yours) to stop the path.

        Args:
            path: the growing path; ``path.leaf.lineage()`` are its segments.
            text: its whole response so far.
        """
        checker = TextChecker(self.config)
        return text_verdict(checker.feed(checker.start(), text), path, self.config)

    def check_finished(self, infer_request: RolloutInferRequest, response_choice: ChatCompletionResponseChoice,
                       current_turn: int) -> bool:
        """Called when a turn has ended, with the meaning that it has in ms-swift. There is one turn: True."""
        return True

    # Machinery below.

    async def async_infer(self,
                          infer_requests: list[RolloutInferRequest | dict[str, Any]],
                          request_config: RequestConfig | dict[str, Any],
                          *,
                          use_tqdm: bool | None = None) -> list[RolloutOutput] | RolloutFailure:
        """swift's server calls this with all requests of a step. See `rollout`; failures become `RolloutFailure`."""
        try:
            return await self.rollout(infer_requests, request_config, use_tqdm=use_tqdm)
        except Exception as e:
            logger.error(f'treepo: the rollout failed.\n{traceback.format_exc()}')
            return RolloutFailure(f'{type(e).__name__}: {e}')

    async def rollout(self,
                      infer_requests: Sequence[RolloutInferRequest | dict[str, Any]],
                      request_config: RequestConfig | dict[str, Any],
                      *,
                      use_tqdm: bool | None = None) -> list[RolloutOutput]:
        """One output per request, in request order, each with its own request's id.

        Raises:
            RolloutError: too many trajectories failed, or the trainer runs without the plugin.
            ConfigError: a setting is unknown or does not fit the engine.
        """
        started = time.perf_counter()
        self._cpu_seconds = 0.0
        if self._engine is None:
            raise RolloutError(
                'TreeRolloutScheduler has no engine: trees need `--vllm_mode server` and `swift rollout`.')
        if isinstance(request_config, dict):
            request_config = RequestConfig(**request_config)
        check_request_config(request_config)
        with self._timed():
            requests = [RolloutInferRequest(**r) if isinstance(r, dict) else copy.copy(r) for r in infer_requests]
            notes = [self._take_note(request) for request in requests]
        if not requests:
            return []
        if notes[0].mode == 'probe':
            return [await self._probe(request, note) for request, note in zip(requests, notes, strict=True)]
        with self._timed():
            # A batch has one trainer, hence one config: the trainer's, if it sent one.
            self.config = notes[0].tree_config(self._default)
            groups = self._group(requests, notes)
            if notes[0].mode == 'tree':
                self._check_config(self.config)
                self._check_budget(groups)
        await self._engine.begin_batch(
            request_config, top_logprobs=self.config.entropy_top_k if self.config.branching == 'entropy' else 0)
        self._reader = PathReader(self._engine.decode, TextChecker(self.config), self._engine.stop_strings)
        groves = await asyncio.gather(*(self._plant(group, requests, notes, request_config) for group in groups))
        shown = len(requests) > 1 if use_tqdm is None else use_tqdm
        with tqdm(total=len(requests), desc='trajectories', dynamic_ncols=True, disable=not shown) as bar:
            sharing = Rendezvous(sum(_shares_budget(grove) for grove in groves))
            seeded = request_config.seed is not None
            await all_or_cancel([self._grow(grove, seeded, sharing, bar) for grove in groves])
        self._check_failures(groves)
        with self._timed():
            outputs = self._outputs(requests, groves)
        if REPORT_KEY in outputs[0].rollout_infos:
            outputs[0].rollout_infos[REPORT_KEY]['batch'] = {
                'seconds': time.perf_counter() - started,
                'scheduler_cpu_seconds': self._cpu_seconds
            }
        return outputs

    def _take_note(self, request: RolloutInferRequest) -> RequestNote:
        """Remove the trainer's note from the request; what is left of `data_dict` is the dataset's."""
        request.data_dict = dict(request.data_dict or {})
        values = request.data_dict.pop(REQUEST_KEY, None)
        if values is not None:
            return RequestNote.from_dict(values)
        if request.messages == SWIFT_PLACEHOLDER:
            return RequestNote(mode='independent')
        if self._default.require_trainer:
            raise RolloutError(
                'This rollout server grows trees, but the request was not sent by TreeGRPOTrainer: the trainer runs '
                'without the plugin and would train on trees with flat advantages. Add the same --external_plugins '
                'file to `swift rlhf` (`treepo-swift plugin` prints its path), or set TREEPO_REQUIRE_TRAINER=false '
                'on the server if that is what you want.')
        return RequestNote()

    def _check_config(self, config: TreeConfig) -> None:
        info = self._engine.info
        config.check_fits(info.max_model_len, '--vllm_max_model_len')
        check_policies(config)
        TextChecker(config)
        if config.branching == 'entropy' and config.entropy_top_k > info.max_logprobs:
            raise ConfigError(f'entropy_top_k={config.entropy_top_k}: this server returns at most {info.max_logprobs} '
                              'log-probs per token. Lower it, or start `swift rollout` with --vllm_engine_kwargs '
                              '\'{"max_logprobs": ...}\'.')
        if config.segment_length % info.block_size:
            self._warn_once(
                f'segment_length={config.segment_length} is not a multiple of the engine\'s KV block of '
                f'{info.block_size} tokens: every fork computes the tokens of its last, partial block again. '
                'Set segment_length to a multiple of it, or --vllm_engine_kwargs \'{"block_size": ...}\' to a divisor.')

    def _check_budget(self, groups: Sequence[Group]) -> None:
        trees = sum(len(group.members) > 1 for group in groups)
        needed = trees * self.config.segment_length
        if self.config.budget == 'by_segment_tokens' and self.config.budget_tokens < needed:
            raise ConfigError(f'budget_tokens={self.config.budget_tokens}: {trees} prompts of a batch need at least a '
                              f'segment of {self.config.segment_length} tokens each, {needed} in all.')

    def _group(self, requests: Sequence[RolloutInferRequest], notes: Sequence[RequestNote]) -> list[Group]:
        keys = [
            prompt_key(
                messages=r.messages,
                images=r.images,
                audios=r.audios,
                videos=r.videos,
                tools=r.tools,
                objects=r.objects,
                data=r.data_dict) for r in requests
        ]
        sizes = [1 if note.mode == 'independent' else note.num_generations for note in notes]
        groups = group_requests(keys, sizes)
        if any(sizes[g.members[0]] not in (None, len(g.members)) for g in groups):
            self._warn_once('A prompt\'s requests were split between servers: its tree becomes several smaller ones. '
                            'Make prompts per step a multiple of the number of servers.')
        return groups

    async def _plant(self, group: Group, requests: Sequence[RolloutInferRequest], notes: Sequence[RequestNote],
                     request_config: RequestConfig) -> _Grove:
        request, note = requests[group.members[0]], notes[group.members[0]]
        config, info = self.config, self._engine.info
        max_response = request_config.max_tokens or info.max_model_len
        if len(group.members) == 1:
            # Plain sampling: one request to the end, no early stop.
            config = TreeConfig(
                seed=config.seed, segment_length=max_response, max_depth=1, answer='none', stop_at_repetition=False)
        prompt, error = Prompt([], {}), None
        try:
            prompt = await self._engine.encode(request)
        except Exception as e:
            error = f'the prompt could not be encoded: {type(e).__name__}: {e}'
        rng = random.Random(f'{config.seed}:{request_config.seed}:{note.step}:{group.copy}:{group.key}')
        search = TreeSearch(
            config,
            tree_id=request.uuid or f'tree-{group.members[0]}',
            prompt_ids=prompt.token_ids,
            width=len(group.members),
            limits=Limits(max_response, info.max_model_len),
            rng=rng,
            progress=note.progress)
        if error:
            search.give_up(error)
        return _Grove(group, request, note, prompt, search)

    async def _grow(self, grove: _Grove, seeded: bool, sharing: Rendezvous, bar: tqdm) -> None:
        """Drive one tree to its end. Whatever happens, no task of it outlives this call.

        `sharing` is where the trees that share a token budget wait for each other.
        """
        search, reported, shares = grove.search, 0, _shares_budget(grove)
        running: set[asyncio.Task] = set()

        def launch(wave: list[SegmentRequest]) -> None:
            running.update(asyncio.ensure_future(self._advance(grove, request, seeded)) for request in wave)

        try:
            if not search.done:
                launch(search.start(self.config.budget_tokens // sharing.members if shares else None))
            while running or search.waiting:
                if not running:
                    growing = await sharing.wait()
                    with self._timed():
                        launch(search.resume(self.config.budget_tokens // growing))
                    continue
                finished, _ = await asyncio.wait(running, return_when=asyncio.FIRST_COMPLETED)
                running -= finished
                for task in finished:
                    launch(task.result())
                bar.update(len(search.tree.trajectories) - reported)
                reported = len(search.tree.trajectories)
        finally:
            if shares:
                sharing.leave()
            for task in running:
                task.cancel()
            await asyncio.gather(*running, return_exceptions=True)

    async def _advance(self, grove: _Grove, request: SegmentRequest, seeded: bool) -> list[SegmentRequest]:
        """Answer one segment request, check the path and return what may start next."""
        search = grove.search
        try:
            segment = await self._ask_engine(grove.prompt, request, request.seed if seeded else None)
            with self._timed():
                path = search.extend(request.id, self._reader.cut_at_stop_string(request.prefix, segment))
            stop = search.stop_of(request.id, await self._check(grove, path))
            if stop is StopReason.ANSWER and self.config.after_answer == 'cut' and segment.stop is None:
                with self._timed():
                    search.cut(request.id, self._reader.answer_length(path.leaf))
            if stop is not None:
                await self._ask_finished(grove, path, stop)
        except (EngineError, HookError) as e:
            self._warn_once(f'{type(e).__name__}: {e}')
            return search.fail(request.id, str(e))
        with self._timed():
            return search.settle(request.id, stop)

    async def _ask_engine(self, prompt: Prompt, request: SegmentRequest, seed: int | None) -> Segment:
        ids = response_ids(request.prefix)
        for attempt in range(self.config.max_retries + 1):
            try:
                return await self._engine.generate(prompt, ids, max_tokens=request.max_tokens, seed=seed)
            except Exception as e:
                if attempt == self.config.max_retries:
                    raise EngineError(f'{type(e).__name__}: {e} (after {attempt + 1} attempts)') from e
        raise AssertionError('unreachable')

    async def _check(self, grove: _Grove, path: Path) -> StopReason | None:
        """What the text of a path says, by the user's `check_segment` or else by the config's checks."""
        if grove.search.width == 1:
            return None
        if type(self).check_segment is TreeRolloutScheduler.check_segment:
            with self._timed():
                return self._text_verdict(path)
        with self._timed():
            text = self._reader.text(path.leaf)
        where = f'on node {path.leaf.id} of tree {grove.search.tree.id}'
        verdict = await self._hooks.call(self.check_segment, path, text, timeout=self.config.hook_timeout, where=where)
        if verdict is not None and not isinstance(verdict, StopReason):
            raise HookError(f'{type(self).__name__}.check_segment {where}: returned {verdict!r}, allowed are a '
                            'StopReason or None')
        return verdict

    def _text_verdict(self, path: Path) -> StopReason | None:
        try:
            return text_verdict(self._reader.state(path.leaf), path, self.config)
        except Exception as e:  # an answer detector may be a user's
            raise HookError(f'answer: {self.config.answer}: raised {type(e).__name__}: {e}') from e

    def _check_failures(self, groves: Sequence[_Grove]) -> None:
        errors = Counter(p.error for grove in groves for p in grove.search.tree.trajectories
                         if p.stop is StopReason.FAILED)
        total = sum(len(grove.group.members) for grove in groves)
        if sum(errors.values()) > self.config.max_failure_fraction * total:
            causes = '\n'.join(f'  {count} x {error}' for error, count in errors.most_common(3))
            raise RolloutError(
                f'{sum(errors.values())} of {total} trajectories failed, more than '
                f'max_failure_fraction={self.config.max_failure_fraction:g}. Most common causes:\n{causes}')

    async def _ask_finished(self, grove: _Grove, path: Path, stop: StopReason) -> None:
        if type(self).check_finished is TreeRolloutScheduler.check_finished:
            return
        ids = response_ids(path.leaf)
        choice = self._writer.choice(grove.prompt, ids, stop)
        choice.token_ids = ids
        messages = [*grove.request.messages, {'role': 'assistant', 'content': choice.message.content}]
        where = f'on node {path.leaf.id} of tree {grove.search.tree.id}'
        finished = await self._hooks.call(
            self.check_finished,
            dataclasses.replace(grove.request, messages=messages),
            choice,
            1,
            timeout=self.config.hook_timeout,
            where=where)
        if not finished:
            raise HookError(f'{type(self).__name__}.check_finished {where}: returned {finished!r}, but '
                            'TreeRolloutScheduler is single-turn in this version and has no next turn to go on with')

    async def _probe(self, request: RolloutInferRequest, note: RequestNote) -> RolloutOutput:
        if note.config is not None:
            self._check_config(note.tree_config(self._default))
        return self._writer.probe(request, await self._engine.score(note.token_ids) if note.token_ids else None)

    @property
    def _writer(self) -> OutputWriter:
        eos = self.tokenizer.eos_token_id
        return OutputWriter(self._engine, self.get_response_token_data, 0 if eos is None else eos)

    def _outputs(self, requests: Sequence[RolloutInferRequest], groves: Sequence[_Grove]) -> list[RolloutOutput]:
        outputs: dict[int, RolloutOutput] = {}
        for grove in groves:
            for index, position in enumerate(grove.group.members):
                outputs[position] = self._writer.trajectory(
                    requests[position], grove.prompt, grove.search.tree, index, with_report=grove.note.mode == 'tree')
        return [outputs[position] for position in range(len(requests))]

    def _warn_once(self, message: str) -> None:
        if message not in self._warned:
            self._warned.add(message)
            logger.warning(f'treepo: {message}')

    @contextmanager
    def _timed(self) -> Iterator[None]:
        """Count the CPU time that the scheduler itself takes from the event loop."""
        started = time.thread_time()
        try:
            yield
        finally:
            self._cpu_seconds += time.thread_time() - started

    def __getattr__(self, key: str) -> Any:
        # swift's base class answers None for names that do not exist, which turns typos into silence.
        value = super().__getattr__(key)
        if value is None:
            raise AttributeError(f'{type(self).__name__} object has no attribute {key!r}')
        return value
