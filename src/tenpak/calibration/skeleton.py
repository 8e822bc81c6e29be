"""A model whose weights come and go, run from any block boundary to any other.

The class is built without weights, and the parameters of one block at a time are read from the checkpoint and dropped
again. No family is known here: the *blocks* are the module list that holds most of the model's parameters, and the
model's own ``forward`` drives them, so masks, positions, embeddings and whatever else a block is called with are what
the model makes of them. Blocks that a run leaves out are replaced by stubs that cost nothing ::

    boundary 0    the input of block 0
    boundary k    the input of block k, as the model hands it over
    boundary n    the output of the last block

A run from boundary a to b executes blocks a … b-1 on hidden states given for a, and stops (by an exception, so nothing
after it is computed) when block b is called. What comes before block 0, embeddings above all, runs every time: it is a
look-up. Runs in several threads do not see each other.

Embeddings are the largest matrices of many models, and past boundary 0 only their place in ``forward`` matters, since
the hidden states are given. ``forget_embedding`` then lets zeros take their place, after making sure on an example that
blocks are called with the same arguments all the same.

This asks that a block depends on the blocks before it through its input only. The few models whose blocks share more
(keys and values, as in Gemma 3n) fail in their own way, which is told.
"""

from __future__ import annotations

import inspect
import threading
from collections import defaultdict
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any, NoReturn

import torch
from torch import Tensor, nn

from tenpak.calibration.calls import hidden_of, replaced, same_but_hidden
from tenpak.checkpoint.source import Checkpoint
from tenpak.checkpoint.structure import Weight, build_meta_model
from tenpak.errors import CalibrationError

__all__ = ["OUTSIDE", "Reader", "Skeleton", "find_blocks"]

OUTSIDE = -1
"""The part of a model that belongs to no block."""

Reader = Callable[[Weight], Tensor]
"""Gives a tensor of the checkpoint in its stored shape: the original, or what became of it."""


class _Reached(BaseException):
    """The boundary where a run ends; no model may mistake it for an error of its own."""

    def __init__(self, hidden: Tensor) -> None:
        super().__init__()
        self.hidden = hidden


@dataclass
class _Run:
    """What a thread is running.

    Attributes:
        start: the boundary it starts from; None for the tokens.
        stop: the boundary it ends at; None for the logits.
        hidden: states at ``start``.
        embedded: the embedding's output, made a leaf, where ``watch`` is set.
        past: whether the last block has been passed.
        call: what the block at ``stop`` was called with.
    """

    start: int | None
    stop: int | None
    hidden: Tensor | None
    watch: bool = False
    embedded: Tensor | None = None
    past: bool = False
    call: tuple[tuple[Any, ...], dict[str, Any]] = ((), {})


@dataclass
class _Current(threading.local):
    run: _Run | None = None


@dataclass
class Skeleton:
    """A model without weights, and where to get them.

    Attributes:
        checkpoint: the source.
        weights: its tensors and their places in the model.
        model: the transformers model; its parameters are on the meta device until they are loaded.
        blocks: its blocks, in order.
        dtype: of loaded floating-point tensors.
    """

    checkpoint: Checkpoint
    weights: tuple[Weight, ...]
    model: Any
    path: str
    blocks: list[nn.Module]
    dtype: torch.dtype = torch.float32
    _sources: dict[str, list[Weight]] = field(default_factory=dict)
    _aliases: dict[str, list[str]] = field(default_factory=dict)
    _format: Any = None
    _current: _Current = field(default_factory=_Current)
    _whole: dict[str, Tensor] | None = None
    _empty: Tensor | None = None

    @classmethod
    def build(
        cls,
        checkpoint: Checkpoint,
        weights: Iterable[Weight],
        *,
        trust_remote_code: bool = False,
        dtype: torch.dtype = torch.float32,
    ) -> Skeleton:
        """The skeleton of a checkpoint whose tensors have been placed (``structure.bind``).

        Raises:
            CheckpointError: transformers cannot build the model.
            CalibrationError: it has no list of blocks.
        """
        model = build_meta_model(checkpoint.folder, trust_remote_code=trust_remote_code, buffers=True).eval()
        for module in model.modules():
            if hasattr(module, "config") and hasattr(module.config, "_experts_implementation"):
                module.config._experts_implementation = "eager"  # the one that multiplies expert by expert
        path, blocks = find_blocks(model)
        made = cls(checkpoint, tuple(weights), model, path, blocks, dtype)
        made._connect()
        return made

    @property
    def parameters(self) -> list[str]:
        """Paths of everything that tensors of the checkpoint fill."""
        return list(self._sources)

    @property
    def parameters_outside(self) -> list[str]:
        """Paths of what is in no block, the head's own weight left out."""
        return [name for name in self._sources if self.place(name) == OUTSIDE and name != self.head]

    @property
    def head(self) -> str | None:
        """Path of the head's weight, where it is not tied to the embedding."""
        path = self._own_weight(self.model.get_output_embeddings())
        return None if path is None or self.embedding in self._aliases.get(path, ()) else path

    @property
    def embedding(self) -> str | None:
        """Path of the input embedding's weight."""
        module = self.model.get_input_embeddings()
        return next((f"{name}.weight" for name, m in self.model.named_modules() if m is module), None)

    def place(self, parameter: str) -> int:
        """The block that a parameter belongs to, or ``OUTSIDE``."""
        rest = parameter.removeprefix(f"{self.path}.")
        number = rest.partition(".")[0]
        return int(number) if rest != parameter and number.isdigit() else OUTSIDE

    def parameters_of(self, block: int) -> list[str]:
        """Paths of a block's parameters and stored buffers."""
        return [name for name in self._sources if self.place(name) == block]

    def load(self, parameters: Iterable[str], read: Reader | None = None) -> None:
        """Give parameters their values; ``read`` says where from, by default the checkpoint."""
        for parameter in parameters:
            value = self._value(parameter, read or (lambda weight: self.checkpoint.read(weight.name)))
            for path in (parameter, *self._aliases.get(parameter, ())):
                self._put(path, value)

    def drop(self, parameters: Iterable[str]) -> None:
        """Forget the values of parameters."""
        for parameter in parameters:
            for path in (parameter, *self._aliases.get(parameter, ())):
                owner, _, name = path.rpartition(".")
                held = self.model.get_submodule(owner)._parameters
                if name in held:
                    held[name] = nn.Parameter(torch.empty_like(held[name], device="meta"), requires_grad=False)

    @contextmanager
    def holding(self, parameters: Iterable[str], read: Reader | None = None) -> Iterator[None]:
        """``load`` parameters, and ``drop`` them at the end."""
        held = list(parameters)
        self.load(held, read)
        try:
            yield
        finally:
            self.drop(held)

    def modules_of(self, parameter: str) -> list[nn.Module]:
        """The modules that have a parameter as their ``weight``, those that it is tied to included."""
        paths = [path.rpartition(".") for path in (parameter, *self._aliases.get(parameter, ()))]
        return [self.model.get_submodule(owner) for owner, _, name in paths if name == "weight"]

    def loaded(self, paths: Iterable[str]) -> dict[str, Tensor]:
        """The parameters at these paths that have values now."""
        found = {path: self.model.get_parameter(path) for path in paths}
        return {path: value for path, value in found.items() if value.device.type != "meta"}

    def run(
        self, ids: Tensor, start: int | None, stop: int | None, hidden: Tensor | None = None, **call: Any
    ) -> Tensor:
        """Hidden states at boundary ``stop``, or the logits where it is None.

        Args:
            ids: int64 ``[batch, tokens]``.
            start: boundary to start from, None for the tokens.
            stop: boundary to end at, None for the logits.
            hidden: the states at ``start``.
            call: passed on to the model's ``forward``.
        """
        return self._run(ids, _Run(start, stop, hidden), **call)

    def run_from_embedding(self, ids: Tensor) -> tuple[Tensor, Tensor]:
        """The embedding's output as a leaf that requires a gradient, and the states at boundary 0 made from it."""
        run = _Run(None, 0, None, watch=True)
        hidden = self._run(ids, run)
        if run.embedded is None:
            raise CalibrationError(f"{type(self.model).__name__} does not call its input embedding")
        return run.embedded, hidden

    @property
    def past_blocks(self) -> bool:
        """Whether this thread's run has come to what follows the last block."""
        run = self._current.run
        return run is not None and run.past

    def stop(self) -> NoReturn:
        """End the run of this thread here and now; what it returns has no meaning."""
        raise _Reached(torch.empty(0))

    def forget_embedding(self, ids: Tensor) -> None:
        """Drop the input embedding, if no block is called with anything else for it; ``ids`` are the example.

        To be used when boundary 0 has been reached for the last time; the head of a tied model goes with it.
        """
        width = self.model.get_input_embeddings().embedding_dim
        calls = []
        for empty in (None, torch.zeros(1, 1, width, dtype=self.dtype)):
            self._empty = empty
            run = _Run(None, 0, None)
            with torch.no_grad():
                self._run(ids, run)
            calls.append(run.call)
        if self.embedding is None or not same_but_hidden(*calls):
            self._empty = None
            return
        shared = next((path for path, also in self._aliases.items() if self.embedding in also), self.embedding)
        self.drop([shared])

    @property
    def keeps_logits(self) -> bool:
        """Whether ``forward`` computes logits of chosen positions only when asked to."""
        return "logits_to_keep" in inspect.signature(self.model.forward).parameters

    def _run(self, ids: Tensor, run: _Run, **call: Any) -> Tensor:
        self._current.run = run
        try:
            logits: Tensor = self.model(input_ids=ids, use_cache=False, **call).logits
        except _Reached as reached:
            return reached.hidden
        except (LookupError, AttributeError, TypeError, ValueError, RuntimeError) as error:
            first = (str(error).splitlines() or [""])[0]
            raise CalibrationError(
                f"{type(self.model).__name__} does not run block by block: {type(error).__name__}: {first}",
                hint="choose recipes that need no statistics, such as int4:g32, for a model of this kind",
            ) from error
        finally:
            self._current.run = None
        return logits

    def _connect(self) -> None:
        """Find what fills which parameter, and put wrappers around blocks and embedding."""
        state = self.model.state_dict()
        sources: dict[str, list[Weight]] = defaultdict(list)
        for weight in self.weights:
            if weight.parameter in state and weight.tied_to is None:
                sources[weight.parameter].append(weight)
        self._sources = dict(sources)
        aliases: dict[str, list[str]] = defaultdict(list)
        for target, source in self.model.all_tied_weights_keys.items():
            if target not in sources and source in sources:
                aliases[source].append(target)
            elif source not in sources and target in sources:
                aliases[target].append(source)
        self._aliases = dict(aliases)
        if any(weight.restructured for weight in self.weights):  # one tensor may become several parameters
            tied = {path for paths in aliases.values() for path in paths}
            self._sources |= {name: [] for name in state if name not in sources and name not in tied}
        for index, block in enumerate(self.blocks):
            block.forward = self._wrapped(index, block.forward)
        embedding = self.model.get_input_embeddings()
        # Of its class as it is then: another one may have taken the weight's place.
        embedding.forward = self._watched(lambda *args, **kwargs: type(embedding).forward(embedding, *args, **kwargs))

    def _wrapped(self, index: int, forward: Callable[..., Any]) -> Callable[..., Any]:
        last = len(self.blocks) - 1

        def call(*args: Any, **kwargs: Any) -> Any:
            run = self._current.run
            assert run is not None, "blocks of a skeleton run through Skeleton.run only"
            if run.stop is not None and index >= run.stop:
                run.call = args, kwargs
                raise _Reached(hidden_of(args, kwargs))
            start = run.start or 0
            run.past = index == last
            if index < start:
                given = run.hidden if index == last else None
                return self._formatted(hidden_of(args, kwargs) if given is None else given)
            if index == run.start and run.hidden is not None:
                args, kwargs = replaced(args, kwargs, run.hidden.clone())  # a block may work in place
            output = forward(*args, **kwargs)
            self._learn_format(output)
            if index == last and run.stop == len(self.blocks):
                raise _Reached(output if isinstance(output, Tensor) else output[0])
            return output

        return call

    def _watched(self, forward: Callable[..., Any]) -> Callable[..., Any]:
        def call(*args: Any, **kwargs: Any) -> Any:
            if self._empty is not None:
                ids: Tensor = args[0] if args else kwargs["input"]
                return self._empty.expand(*ids.shape, -1).clone()
            output = forward(*args, **kwargs)
            run = self._current.run
            if run is not None and run.watch and run.embedded is None:
                run.embedded = output.detach().requires_grad_()
                return run.embedded.clone()
            return output

        return call

    def _learn_format(self, output: Any) -> None:
        """How a block returns its hidden states; what it returns beside them (attention maps) nobody asked for."""
        if isinstance(output, Tensor):
            return
        self._format = type(output), tuple(None if isinstance(part, Tensor) else part for part in output[1:])

    def _formatted(self, hidden: Tensor) -> Any:
        return hidden if self._format is None else self._format[0]((hidden, *self._format[1]))

    def _own_weight(self, module: nn.Module | None) -> str | None:
        path = next((f"{name}.weight" for name, m in self.model.named_modules() if m is module), None)
        return path if path in self._sources else None

    def _value(self, parameter: str, read: Reader) -> Tensor:
        """What the checkpoint's tensors make of a parameter."""
        weights = self._sources[parameter]
        if not weights or any(weight.restructured for weight in weights):
            return self._restructured(parameter)
        if weights[0].slot is None:
            return self._typed(read(weights[0]))
        experts: dict[int, list[Tensor]] = defaultdict(list)
        for weight in sorted(weights, key=lambda weight: weight.slot or (0, 0)):
            assert weight.slot is not None
            experts[weight.slot[0]].append(self._typed(read(weight)))
        return torch.stack([torch.cat(parts) for _, parts in sorted(experts.items())])

    def _restructured(self, parameter: str) -> Tensor:
        """A parameter that only transformers knows how to make; it loads the whole model for the first of them."""
        if self._whole is None:
            whole = type(self.model).from_pretrained(self.checkpoint.folder, dtype=self.dtype)
            state = whole.state_dict()
            made = [name for name, parts in self._sources.items() if not parts or parts[0].restructured]
            self._whole = {name: state[name].clone() for name in made}
        return self._typed(self._whole[parameter])

    def _typed(self, tensor: Tensor) -> Tensor:
        if tensor.untyped_storage().nbytes() != tensor.numel() * tensor.itemsize:
            tensor = tensor.clone()  # a view: weights are told from each other by their memory
        return tensor.to(self.dtype) if tensor.is_floating_point() else tensor

    def _put(self, path: str, value: Tensor) -> None:
        owner, _, name = path.rpartition(".")
        module = self.model.get_submodule(owner)
        if name in module._parameters:
            module._parameters[name] = nn.Parameter(value, requires_grad=False)
        else:
            module._buffers[name] = value


def find_blocks(model: nn.Module) -> tuple[str, list[nn.Module]]:
    """Path and modules of the list with the most parameters; of equal ones the outermost, which comes first.

    Raises:
        CalibrationError: the model has no list of modules.
    """
    modules = model.named_modules()
    lists = [(name, module) for name, module in modules if isinstance(module, nn.ModuleList) and len(module)]
    if not lists:
        raise CalibrationError(
            f"{type(model).__name__} has no list of blocks to calibrate one after another",
            hint="use a recipe that needs no statistics, such as int4:g32",
        )
    path, blocks = max(lists, key=lambda item: sum(p.numel() for p in item[1].parameters()))
    return path, list(blocks)
