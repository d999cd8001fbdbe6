"""Small faults that are put into a module's syntax tree, one at a time: how `tests.mutants` makes its mutants."""

import ast
import copy
import re
from collections.abc import Callable, Iterator
from dataclasses import dataclass

FLIPS: dict[type, tuple[type, ...]] = {  # comparison -> what stands in its place: the boundary moved, and the opposite
    ast.Lt: (ast.LtE, ast.GtE), ast.LtE: (ast.Lt, ast.Gt), ast.Gt: (ast.GtE, ast.LtE), ast.GtE: (ast.Gt, ast.Lt),
    ast.Eq: (ast.NotEq,), ast.NotEq: (ast.Eq,), ast.Is: (ast.IsNot,), ast.IsNot: (ast.Is,),
    ast.In: (ast.NotIn,), ast.NotIn: (ast.In,),
}  # fmt: skip
SWAPS: dict[type, type] = {
    ast.Add: ast.Sub, ast.Sub: ast.Add, ast.Mult: ast.Div, ast.Div: ast.Mult, ast.FloorDiv: ast.Mult,
    ast.Mod: ast.FloorDiv, ast.Pow: ast.Mult,
}  # fmt: skip
OPPOSITES = {"min": "max", "minimum": "maximum", "amin": "amax", "any": "all"}
OPPOSITES |= {second: first for first, second in OPPOSITES.items()}
UNTOUCHED_FIELDS = {"annotation", "returns", "decorator_list", "bases", "format_spec", "type_params"}

Put = Callable[[ast.AST], None]


@dataclass(frozen=True)
class Mutant:
    """One fault in one file.

    Attributes:
        path: Of the file, from the folder of the package.
        line: Where the changed expression begins in the file.
        before: The line, as `ast.unparse` writes it.
        after: The same line with the fault.
        source: The whole file with the fault.
    """

    path: str
    line: int
    before: str
    after: str
    source: str


def mutants_of(source: str, path: str, functions: tuple[str, ...] = ()) -> list[Mutant]:
    """Every mutant of a file, in the order of the file; no two of them have the same source.

    Args:
        functions: Only inside functions of these names; none: in the whole file.
    Raises: LookupError: if the file has no such function.
    """
    tree = ast.parse(source)
    missing = set(functions) - {node.name for node in ast.walk(tree) if isinstance(node, ast.FunctionDef)}
    if missing:
        raise LookupError(f"{path} has no function {', '.join(sorted(missing))}. Name the present ones in ROOMS.")
    plain = ast.unparse(tree)
    found: dict[str, Mutant] = {}
    for node, put in _places(tree, functions, inside=not functions):
        for variant in _variants(node):
            put(variant)
            changed = ast.unparse(ast.fix_missing_locations(tree))
            put(node)
            if changed != plain:
                before, after = _first_difference(plain, changed)
                found.setdefault(changed, Mutant(path, node.lineno, before, after, changed))
    return list(found.values())


def written_mutant(source: str, path: str, pattern: str, replacement: str) -> Mutant:
    """The mutant that a regular expression makes of a file's text, as `ast.unparse` writes it.

    Raises: LookupError: unless the pattern is found exactly once.
    """
    plain = ast.unparse(ast.parse(source))
    matches = list(re.finditer(pattern, plain))
    if len(matches) != 1:
        raise LookupError(f"{len(matches)} places in {path} match {pattern!r}, expected one. Adapt the pattern.")
    changed = ast.unparse(ast.parse(re.sub(pattern, replacement, plain)))
    before, after = _first_difference(plain, changed)
    return Mutant(path, plain[: matches[0].start()].count("\n") + 1, before, after, changed)


def _first_difference(plain: str, changed: str) -> tuple[str, str]:
    pairs = zip(plain.splitlines(), changed.splitlines(), strict=False)
    before, after = next(pair for pair in pairs if pair[0] != pair[1])
    return before.strip(), after.strip()


def _places(node: ast.AST, functions: tuple[str, ...], inside: bool) -> Iterator[tuple[ast.AST, Put]]:
    """Expressions and statements below `node` that may change, each with what puts another one in its place."""
    for name, value in ast.iter_fields(node):
        if name in UNTOUCHED_FIELDS:
            continue
        children = [(value, _setter(node, name))] if isinstance(value, ast.AST) else []
        if isinstance(value, list):
            children = [(child, _setter(value, i)) for i, child in enumerate(value) if isinstance(child, ast.AST)]
        for child, put in children:
            if isinstance(child, ast.Import | ast.ImportFrom):
                continue
            within = inside or (isinstance(child, ast.FunctionDef) and child.name in functions)
            if within and hasattr(child, "lineno"):
                yield child, put
            elif within and isinstance(child, ast.comprehension):
                yield from ((test, _setter(child.ifs, i)) for i, test in enumerate(map(_Condition, child.ifs)))
            yield from _places(child, functions, within)


class _Condition(ast.expr):
    """Marks the condition of a comprehension, whose negation is a mutant of its own."""

    _fields = ("test",)

    def __init__(self, test: ast.expr):
        self.test, self.lineno = test, test.lineno


def _setter(holder: ast.AST | list, key: str | int) -> Put:
    def put(new: ast.AST) -> None:
        new = new.test if isinstance(new, _Condition) else new
        if isinstance(holder, list):
            holder[key] = new
        else:
            setattr(holder, key, new)

    return put


def _variants(node: ast.AST) -> Iterator[ast.AST]:
    """What may stand in the place of a node."""
    changes = CHANGES.get(type(node))
    for change in changes(node) if changes else ():
        if isinstance(change, dict):
            other = copy.copy(node)
            for name, value in change.items():
                setattr(other, name, value)
            yield other
        else:
            yield change


def _of_compare(node: ast.Compare) -> Iterator[dict]:
    for index, operator in enumerate(node.ops):
        for flipped in FLIPS[type(operator)]:
            yield {"ops": [*node.ops[:index], flipped(), *node.ops[index + 1 :]]}


def _of_product_or_sum(node: ast.BinOp) -> Iterator[dict | ast.AST]:
    swapped = SWAPS.get(type(node.op))
    if swapped:
        yield {"op": swapped()}
        yield node.left
        if not isinstance(node.op, ast.Pow):
            yield node.right


def _of_augmented(node: ast.AugAssign) -> Iterator[dict | ast.AST]:
    if type(node.op) in SWAPS:
        yield {"op": SWAPS[type(node.op)]()}
    yield _nothing(node)


def _of_boolean(node: ast.BoolOp) -> Iterator[dict]:
    yield {"op": ast.And() if isinstance(node.op, ast.Or) else ast.Or()}
    for index in range(len(node.values)):
        rest = node.values[:index] + node.values[index + 1 :]
        yield rest[0] if len(rest) == 1 else {"values": rest}


def _of_unary(node: ast.UnaryOp) -> Iterator[ast.AST]:
    if isinstance(node.op, ast.Not) or (isinstance(node.op, ast.USub) and not isinstance(node.operand, ast.Constant)):
        yield node.operand


def _of_constant(node: ast.Constant) -> Iterator[dict]:
    if isinstance(node.value, bool):
        yield {"value": not node.value}
    elif isinstance(node.value, int):
        yield {"value": node.value + 1}
    elif isinstance(node.value, float):
        yield {"value": node.value * 2 or 1.0}


def _of_condition(node: ast.If | ast.IfExp | ast.While | _Condition) -> Iterator[dict | ast.AST]:
    if not isinstance(node.test, ast.Compare | ast.Constant):  # a comparison has its opposite already
        negated = ast.UnaryOp(ast.Not(), node.test)
        yield negated if isinstance(node, _Condition) else {"test": negated}


def _of_slice(node: ast.Slice) -> Iterator[dict]:
    one = ast.Constant(1)
    yield {"lower": one if node.lower is None else ast.BinOp(node.lower, ast.Add(), one)}
    upper = ast.UnaryOp(ast.USub(), one) if node.upper is None else ast.BinOp(node.upper, ast.Sub(), one)
    yield {"upper": upper}


def _of_call(node: ast.Call) -> Iterator[dict | ast.AST]:
    """A method that works in place is left out; the least becomes the greatest."""
    if isinstance(node.func, ast.Name) and node.func.id in OPPOSITES:
        yield {"func": ast.Name(OPPOSITES[node.func.id], ast.Load())}
    if isinstance(node.func, ast.Attribute):
        name = node.func.attr
        if name in OPPOSITES:
            yield {"func": ast.Attribute(node.func.value, OPPOSITES[name], ast.Load())}
        elif name.endswith("_") and not name.endswith("__"):
            yield node.func.value


def _of_expression(node: ast.Expr) -> Iterator[ast.AST]:
    if not isinstance(node.value, ast.Constant | ast.Yield):
        yield _nothing(node)


def _of_assignment(node: ast.Assign) -> Iterator[ast.AST]:
    """Whatever writes into something that exists already is left out."""
    if any(isinstance(target, ast.Subscript | ast.Attribute) for target in node.targets):
        yield _nothing(node)


def _nothing(node: ast.stmt) -> ast.Pass:
    return ast.copy_location(ast.Pass(), node)


CHANGES: dict[type, Callable] = {
    ast.Compare: _of_compare, ast.BinOp: _of_product_or_sum, ast.AugAssign: _of_augmented, ast.BoolOp: _of_boolean,
    ast.UnaryOp: _of_unary, ast.Constant: _of_constant, ast.If: _of_condition, ast.IfExp: _of_condition,
    ast.While: _of_condition, _Condition: _of_condition, ast.Slice: _of_slice, ast.Call: _of_call,
    ast.Expr: _of_expression, ast.Assign: _of_assignment,
}  # fmt: skip
