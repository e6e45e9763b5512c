# SPDX-License-Identifier: Apache-2.0
"""How a transformers model brings its logits to ``self.loss_function``, read from its forward.

``loss_route`` knows a forward that computes ``v = self.<head>(...)``, may scale, cap or cast ``v``
elementwise by numbers, gives it to ``self.loss_function`` and returns it, and uses it nowhere else.
Such a model computes the same on any columns of the logits. Of any other forward nothing is known:
it may select columns, as padded vocabularies do, or add a term of all logits to the loss.
"""

from __future__ import annotations

import ast
import inspect
import textwrap
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

from torch import nn

from deepspeed_autotp.interop.peft import without_adapters
from deepspeed_autotp.interop.torch_private import output_hooks

_SHIFTS = {"ForCausalLMLoss": True, "ForMaskedLMLoss": False}
_LOSS = "self.loss_function"
_TANH = ("torch.tanh", "nn.functional.tanh", "F.tanh")
_CASTS = ("float", "contiguous")
_FLOAT = ("float", "")
_GETTERS = ("get_text_config", "get_decoder")
_Steps = tuple[tuple[str, str], ...]


@dataclass(frozen=True, slots=True)
class LossRoute:
    """From the head of ``model`` to its loss.

    shifts        the labels are those of the next token
    soft_cap      name, from ``self`` on, of the c of a final ``c tanh(logits / c)`` that the
                  forward leaves out where c is None; empty without one
    ends_in_tanh  the loss is given the result of a tanh, which its backward reads
    upcasts       what the head gives goes to the loss as it is, but for ``.float()``, in any call
    cap_upcasts   the same within the soft cap
    """

    model: Any
    shifts: bool
    soft_cap: str
    ends_in_tanh: bool
    upcasts: bool
    cap_upcasts: bool

    @contextmanager
    def soft_cap_as(self, value: float | None) -> Iterator[float]:
        """Let the forward have this soft cap meanwhile, or leave its own out with None; the one of
        before, or 0 without one."""
        holder, _, key = self.soft_cap.rpartition(".")
        values = vars(_resolved(self.model, holder)) if holder else {}
        cap = values.get(key)
        if value is None and not (isinstance(cap, (int, float)) and cap > 0):
            yield 0.0
            return
        values[key] = value
        try:
            yield float(cap or 0.0)
        finally:
            values[key] = cap


def loss_route(model: nn.Module, head: nn.Module) -> LossRoute | None:
    """The route of ``model``, or of the one inside of its adapters; None where none is known."""
    inner: Any = without_adapters(model)
    loss = getattr(inner, "loss_function", None)
    name = getattr(loss, "__name__", "")
    if getattr(loss, "__module__", "") != "transformers.loss.loss_utils" or name not in _SHIFTS:
        return None
    if "forward" in vars(inner):  # replaced, as TRL and Liger do
        return None
    try:
        source = textwrap.dedent(inspect.getsource(inspect.unwrap(type(inner).forward)))
        forward = _Forward(ast.parse(source), inner, head)
    except (_UnknownError, OSError, TypeError, SyntaxError):
        return None
    return LossRoute(
        inner,
        shifts=_SHIFTS[name],
        soft_cap=forward.soft_cap,
        ends_in_tanh=forward.ends_in_tanh,
        upcasts=forward.upcasts,
        cap_upcasts=forward.cap_upcasts,
    )


def replace_loss(model: Any, loss: Callable[..., Any]) -> Callable[[], None]:
    """Make ``loss`` the loss function of a transformers model; returns the undo."""
    before = vars(model).get("_loss_function")
    model.loss_function = loss

    def back() -> None:
        if before is None:
            del model._loss_function
        else:
            model.loss_function = before

    return back


def has_user_hooks(module: nn.Module) -> bool:
    """Whether others than DeepSpeed and this package watch the output of ``module``."""
    own = ("deepspeed.", "deepspeed_autotp.")
    return any(
        not str(getattr(hook, "__module__", "")).startswith(own) for hook in output_hooks(module)
    )


class _UnknownError(Exception):
    """Something that is not of the known kinds."""


class _Forward:
    """The logits in the source of one forward; _UnknownError where a use of them is not known."""

    def __init__(self, tree: ast.AST, model: nn.Module, head: nn.Module) -> None:
        self._model = model
        self._nodes = list(ast.walk(tree))
        self._parents = {child: p for p in self._nodes for child in ast.iter_child_nodes(p)}
        calls = [n for n in self._nodes if isinstance(n, ast.Call) and self._calls(n, head)]
        if len(calls) != 1:
            raise _UnknownError
        first = self._statement(calls[0])
        self._name = self._target(first)
        self._root = ast.unparse(calls[0])
        self._steps: dict[ast.stmt, _Steps] = {}  # in the order of the source
        uses = [n for n in self._nodes if isinstance(n, ast.Name) and n.id == self._name]
        uses.sort(key=lambda n: (n.lineno, n.col_offset))
        for store in [n for n in uses if isinstance(n.ctx, ast.Store)]:
            at = self._statement(store)
            if self._target(at) != self._name:
                raise _UnknownError
            self._steps[at] = self._chain(at.value)
            self._root = self._root if at is not first else self._name
        kinds = [self._kind(n) for n in uses if isinstance(n.ctx, ast.Load)]
        if kinds.count("loss") != 1:
            raise _UnknownError
        self.soft_cap, self.cap_upcasts = self._soft_cap()
        steps = [step for found in self._steps.values() for step in found]
        computed = [step for step in steps if step != _FLOAT]
        self.ends_in_tanh = bool(computed) and computed[-1][0] == "tanh"
        is_always = {self._parents[at] for at in self._steps} == {self._parents[first]}
        self.upcasts = bool(steps) and not computed and is_always

    def _statement(self, node: ast.AST) -> Any:
        while not isinstance(node, ast.stmt):
            node = self._parents[node]
        return node

    def _target(self, statement: ast.stmt) -> str:
        match statement:
            case ast.Assign(targets=[ast.Name(id=name)]):
                return name
        raise _UnknownError

    def _kind(self, name: ast.Name) -> str:
        """What a use of the logits is: their loss, a step, or a part of what is returned."""
        at, parent = self._statement(name), self._parents[name]
        if at in self._steps:
            return "step"
        given = isinstance(parent, ast.keyword) and parent.arg == "logits"
        call = self._parents[parent] if given else parent
        if isinstance(call, ast.Call) and ast.unparse(call.func) == _LOSS:
            if given or call.args[:1] == [name]:
                return "loss"
        elif (
            isinstance(at, ast.Return)
            and given
            or isinstance(parent, ast.Tuple)
            and self._is_returned(at, parent)
        ):
            return "result"
        raise _UnknownError

    def _is_returned(self, at: ast.stmt, found: ast.Tuple) -> bool:
        """Whether ``at`` is ``output = (logits,) + ...`` of an output that is returned alone."""
        match at:
            case ast.Assign(targets=[ast.Name(id=name)], value=ast.BinOp(left=left)):
                uses = [n for n in self._nodes if isinstance(n, ast.Name) and n.id == name]
                loads = [n for n in uses if isinstance(n.ctx, ast.Load)]
                return left is found and all(
                    isinstance(self._statement(n), ast.Return) for n in loads
                )
        return False

    def _chain(self, value: ast.expr) -> _Steps:
        """The steps from the logits to ``value``, in order."""
        if ast.unparse(value) == self._root:
            return ()
        match value:
            case ast.Call(func=ast.Attribute(value=x, attr=name), args=[]) if name in _CASTS:
                return (*self._chain(x), _FLOAT) if name == "float" else self._chain(x)
            case ast.Call(func=function, args=[x]) if ast.unparse(function) in _TANH:
                return (*self._chain(x), ("tanh", ""))
            case ast.BinOp(left=x, op=ast.Div(), right=number):
                return (*self._chain(x), ("/", self._number(number)))
            case ast.BinOp(left=x, op=ast.Mult(), right=number):
                return (*self._chain(x), ("*", self._number(number)))
        raise _UnknownError

    def _number(self, node: ast.expr) -> str:
        """The name of a number, or of None."""
        if isinstance(node, ast.Constant) and type(node.value) in (int, float):
            return str(node.value)
        name = self._full_name(node)
        if type(_resolved(self._model, name)) not in (int, float, type(None)):
            raise _UnknownError
        return name

    def _soft_cap(self) -> tuple[str, bool]:
        """The c of three last statements that are a soft cap unless c is None, or nothing; and
        whether they upcast."""
        last = list(self._steps)[-3:]
        match self._parents[last[-1]]:
            case ast.If(test=ast.Compare(left=x, ops=[ast.IsNot()]), body=body, orelse=[]):
                name = self._full_name(x)
                steps = [step for at in last for step in self._steps[at]]
                cap_steps = [("/", name), ("tanh", ""), ("*", name)]
                if body == last and [step for step in steps if step != _FLOAT] == cap_steps:
                    return name, _FLOAT in steps
        return "", False

    def _calls(self, call: ast.Call, head: nn.Module) -> bool:
        try:
            return _resolved(self._model, self._full_name(call.func)) is head
        except _UnknownError:
            return False

    def _full_name(self, node: ast.expr) -> str:
        """``self.config.x`` for a node that reads it, or a local name that is assigned once."""
        match node:
            case ast.Name(id="self"):
                return "self"
            case ast.Name(id=name):
                values = [value for target, value in self._assignments() if target == name]
                if len(values) == 1:
                    return self._full_name(values[0])
            case ast.NamedExpr(value=value):
                return self._full_name(value)
            case ast.Attribute(value=holder, attr=name):
                return f"{self._full_name(holder)}.{name}"
            case ast.Call(func=ast.Name(id="getattr"), args=[holder, ast.Constant(value=key), *_]):
                return f"{self._full_name(holder)}.{key!s}"
            case ast.Call(func=ast.Attribute(attr=name), args=[], keywords=[]) if name in _GETTERS:
                return f"{self._full_name(node.func)}()"
        raise _UnknownError

    def _assignments(self) -> Iterator[tuple[str, ast.expr]]:
        for node in self._nodes:
            match node:
                case ast.Assign(targets=[ast.Name(id=name)], value=value):
                    yield name, value
                case ast.NamedExpr(target=ast.Name(id=name), value=value):
                    yield name, value


def _resolved(model: Any, name: str) -> Any:
    """The value of ``self.a.b().c``."""
    value = model
    for part in name.split(".")[1:]:
        value = getattr(value, part.removesuffix("()"), None)
        value = value() if part.endswith("()") and value is not None else value
    return value
