"""Reads a gradient leaf off a jaxpr as a sum of products whose operands are already there."""

import dataclasses
import itertools
import math
from typing import Any

import numpy as np
from jax import lax

from dpjax.clipping.compat import REMAT, SCAN, Literal, Scope, inner_scope, scan_arity
from dpjax.clipping.jaxprs import Here, Inside
from dpjax.clipping.patches import conv_operands
from dpjax.clipping.products import Carried, Layout, Operand, Product, Region, RowIndex, Term

MOST_TERMS = 64  # norms need every pair of terms

_fresh = itertools.count()


def producers(scope: Scope) -> dict:
    """The equation and output number that each variable comes from."""
    return {v: (eqn, i) for eqn in scope.jaxpr.eqns for i, v in enumerate(eqn.outvars)}


class Reader:
    """Reads the leaves of one scope."""

    def __init__(self, scope: Scope, carried: Any = None):
        self.scope = scope
        self.carried = carried
        self.sources = producers(scope)
        self.known: dict[Any, list[Term] | None] = {}

    def terms(self, atom: Any) -> list[Term] | None:
        """The terms whose sum is ``atom``, or None where it is not recognised."""
        if isinstance(atom, Literal):
            return [] if np.all(np.asarray(atom.val) == 0) else None
        if atom not in self.known:
            found = self._read(atom)
            self.known[atom] = None if found is None or len(found) > MOST_TERMS else found
        return self.known[atom]

    def _read(self, atom: Any) -> list[Term] | None:
        if atom is self.carried:
            return [Carried()]
        if atom not in self.sources:
            return None
        eqn, output = self.sources[atom]
        name = eqn.primitive.name.replace("-", "_")
        read = getattr(self, f"read_{name}", None)
        return None if read is None else read(eqn, output)

    # Sums and scalings.

    def read_add(self, eqn, _):
        if any(v.aval.shape != eqn.outvars[0].aval.shape for v in eqn.invars):
            return None
        total: list[Term] = []
        for part in map(self.terms, eqn.invars):
            if part is None:
                return None
            total += part
        return total

    read_add_any = read_add

    def _scaled(self, atom, scale):
        terms = self.terms(atom)
        if terms is None:
            return None
        return [dataclasses.replace(t, scale=t.scale * scale) for t in terms]

    def read_neg(self, eqn, _):
        return self._scaled(eqn.invars[0], -1.0)

    def read_mul(self, eqn, _):
        x, y = eqn.invars
        if isinstance(x, Literal):
            x, y = y, x
        if not isinstance(y, Literal) or np.shape(y.val) != () or isinstance(x, Literal):
            return None
        return self._scaled(x, float(y.val)) if math.isfinite(y.val) else None

    def read_div(self, eqn, _):
        x, y = eqn.invars
        if not isinstance(y, Literal) or np.shape(y.val) != () or isinstance(x, Literal):
            return None
        usable = math.isfinite(y.val) and y.val != 0
        return self._scaled(x, 1.0 / float(y.val)) if usable else None

    # What leaves the values as they are.

    def _same(self, eqn, _):
        return self.terms(eqn.invars[0])

    read_copy = read_copy_p = read_name = read_sharding_constraint = read_reduce_precision = _same

    def read_convert_element_type(self, eqn, _):
        # Narrow types on the way (bfloat16) would round each example's gradient; the products
        # are accumulated in float32 instead.
        kinds = {np.dtype(v.aval.dtype).kind for v in (eqn.invars[0], eqn.outvars[0])}
        return self.terms(eqn.invars[0]) if kinds <= {"f", "V"} else None

    def read_optimization_barrier(self, eqn, output):
        return self.terms(eqn.invars[output])

    def read_broadcast_in_dim(self, eqn, _):
        value, shape = eqn.invars[0], tuple(eqn.outvars[0].aval.shape)
        terms = self.terms(value)
        if terms is None or not terms:
            return terms
        old = value.aval.shape
        kept = eqn.params["broadcast_dimensions"]
        grown = [n for i, n in enumerate(shape) if i not in kept]
        if any(n != 1 for n in grown) or tuple(shape[i] for i in kept) != tuple(old):
            return None
        return _laid_out(terms, Layout("reshape", shape))

    # What moves them.

    def read_reshape(self, eqn, _):
        return None if eqn.params.get("dimensions") is not None else self._reshaped(eqn, _)

    def _reshaped(self, eqn, _):
        shape = tuple(eqn.outvars[0].aval.shape)
        if shape == tuple(eqn.invars[0].aval.shape):
            return self.terms(eqn.invars[0])
        return _laid_out(self.terms(eqn.invars[0]), Layout("reshape", shape))

    read_squeeze = read_expand_dims = _reshaped

    def read_transpose(self, eqn, _):
        permutation = tuple(int(i) for i in eqn.params["permutation"])
        return _laid_out(self.terms(eqn.invars[0]), Layout("transpose", permutation))

    def read_rev(self, eqn, _):
        return _laid_out(self.terms(eqn.invars[0]), Layout("rev", tuple(eqn.params["dimensions"])))

    def read_pad(self, eqn, _):
        value, filling = eqn.invars
        config = tuple(tuple(int(n) for n in c) for c in eqn.params["padding_config"])
        if all(low <= 0 and high <= 0 and inner == 0 for low, high, inner in config):
            shape = value.aval.shape  # the gradient of padding: it cuts
            pairs = zip(config, shape, strict=True)
            return self._cut(value, [(-low, n + high, 1) for (low, high, _), n in pairs])
        is_zero = isinstance(filling, Literal) and filling.val == 0
        if not is_zero or any(n < 0 for c in config for n in c):
            return None
        return _laid_out(self.terms(value), Layout("pad", config))

    def read_concatenate(self, eqn, _):
        axis, total, start = eqn.params["dimension"], [], 0
        whole = eqn.outvars[0].aval.shape
        for part in eqn.invars:
            size = part.aval.shape[axis]
            terms = self.terms(part)
            if terms is None:
                return None
            config = [(0, 0, 0)] * len(whole)
            config[axis] = (start, whole[axis] - start - size, 0)
            total += _laid_out(terms, Layout("pad", tuple(config))) or []
            start += size
        return total

    def read_dynamic_update_slice(self, eqn, _):
        into, value, *starts = eqn.invars
        background, terms = self.terms(into), self.terms(value)
        if background != [] or terms is None:
            return None
        if not all(isinstance(s, Literal) for s in starts):
            return None
        whole, part = into.aval.shape, value.aval.shape
        at = [min(max(int(s.val), 0), w - p) for s, w, p in zip(starts, whole, part, strict=True)]
        config = tuple((a, w - p - a, 0) for a, w, p in zip(at, whole, part, strict=True))
        return _laid_out(terms, Layout("pad", config))

    # What drops some of them.

    def read_slice(self, eqn, _):
        p = eqn.params
        strides = p["strides"] or (1,) * len(p["start_indices"])
        cuts = list(zip(p["start_indices"], p["limit_indices"], strides, strict=True))
        return self._cut(eqn.invars[0], cuts)

    def read_split(self, eqn, output):
        sizes = [int(n) for n in eqn.params["sizes"]]
        cuts = [(0, n, 1) for n in eqn.invars[0].aval.shape]
        start = sum(sizes[:output])
        cuts[eqn.params["axis"]] = (start, start + sizes[output], 1)
        return self._cut(eqn.invars[0], cuts)

    def _cut(self, atom, cuts):
        terms = self.terms(atom)
        if terms is None:
            return None
        out = []
        for term in terms:
            if not isinstance(term, Product) or term.layout:
                return None
            for label, size, cut in zip(term.core, atom.aval.shape, cuts, strict=True):
                start, stop, stride = map(int, cut)
                if (start, stop, stride) != (0, size, 1):
                    term = _sliced(term, label, (start, stop, stride))
                    if term is None:
                        return None
            out.append(term)
        return out

    def read_reduce_sum(self, eqn, _):
        terms = self.terms(eqn.invars[0])
        if terms is None:
            return None
        out = []
        for term in terms:
            if not isinstance(term, Product) or term.layout:
                return None
            gone = {term.core[i] for i in eqn.params["axes"]}
            if any(o.rows is not None and o.rows.label in gone for o in (term.lhs, term.rhs)):
                return None
            core_left = tuple(label for label in term.core if label not in gone)
            out.append(dataclasses.replace(term, core=core_left))
        return out

    # Products.

    def read_dot_general(self, eqn, _):
        (lc, rc), (lb, rb) = eqn.params["dimension_numbers"]
        lhs, rhs = eqn.invars
        if not _is_real(lhs) or not _is_real(rhs):
            return None
        left = [next(_fresh) for _ in lhs.aval.shape]
        right = [next(_fresh) for _ in rhs.aval.shape]
        for i, j in zip((*lc, *lb), (*rc, *rb), strict=True):
            right[j] = left[i]
        core_labels = [left[i] for i in lb]
        core_labels += [v for i, v in enumerate(left) if i not in (*lb, *lc)]
        core_labels += [v for j, v in enumerate(right) if j not in (*rb, *rc)]
        return [Product(_operand(lhs, left), _operand(rhs, right), tuple(core_labels))]

    def read_scatter_add(self, eqn, _):
        into, index, updates = eqn.invars
        background = self.terms(into)
        d = eqn.params["dimension_numbers"]
        whole, part = into.aval.shape, updates.aval.shape
        one = len(d.scatter_dims_to_operand_dims) == 1 and index.aval.shape[-1:] == (1,)
        plain = not d.operand_batching_dims and not d.scatter_indices_batching_dims
        axis = d.scatter_dims_to_operand_dims[0] if one else -1
        if background is None or not (one and plain and d.inserted_window_dims == (axis,)):
            return None
        window = [i for i in range(len(whole)) if i != axis]
        if [part[j] for j in d.update_window_dims] != [whole[i] for i in window]:
            return None
        labels = [next(_fresh) for _ in part]
        row = next(_fresh)
        positions = [v for j, v in enumerate(labels) if j not in d.update_window_dims]
        core_labels = [row if i == axis else -1 for i in range(len(whole))]
        for i, j in zip(window, d.update_window_dims, strict=True):
            core_labels[i] = labels[j]
        clips = eqn.params["mode"] == lax.GatherScatterMode.CLIP
        rows = Operand(
            Here(index),
            tuple(positions),
            tuple(index.aval.shape[:-1]),
            index.aval.dtype,
            view=_without_last_axis,
            rows=RowIndex(whole[axis], row, clips),
        )
        return [*background, Product(rows, _operand(updates, labels), tuple(core_labels))]

    def read_conv_general_dilated(self, eqn, _):
        lhs, rhs = eqn.invars
        if not _is_real(lhs) or not _is_real(rhs):
            return None
        found = conv_operands(eqn, lambda: next(_fresh))
        left, right, core_labels, shape = found
        product = Product(
            Operand(Here(lhs), left.labels, left.sizes, lhs.aval.dtype, view=left.view),
            Operand(Here(rhs), right.labels, right.sizes, rhs.aval.dtype, view=right.view),
            core_labels,
        )
        return [product] if shape is None else _laid_out([product], Layout("reshape", shape))

    # Bodies.

    def read_scan(self, eqn, output):
        body = inner_scope(eqn)
        consts, carried = scan_arity(eqn)
        inner = body.jaxpr.outvars[output]
        total: list[Term] = []
        if output >= carried:
            terms = Reader(body).terms(inner)
        else:
            # A sum over iterations: what comes in is passed on, with something added.
            into = body.jaxpr.invars[consts + output]
            start = self.terms(eqn.invars[consts + output])
            terms = Reader(body, into).terms(inner)
            if terms is None or start is None or _uses(body, into) != 1:
                return None
            if [t for t in terms if isinstance(t, Carried)] != [Carried()]:
                return None
            terms = [t for t in terms if not isinstance(t, Carried)]
            total += start
        if terms is None:
            return None
        for term in terms:
            lifted = _through_scan(term, eqn, body, stacked=output >= carried)
            if lifted is None:
                return None
            total.append(lifted)
        return total

    def read_remat2(self, eqn, output):
        body = inner_scope(eqn)
        value = body.jaxpr.outvars[output]
        terms = Reader(body).terms(value)
        if terms is None or not all(isinstance(t, Product) for t in terms):
            return None
        if not terms:
            return []
        return [Region(tuple(terms), (eqn,), tuple(value.aval.shape))]

    read_checkpoint = read_remat = read_remat2


assert f"read_{REMAT}" in vars(Reader) and f"read_{SCAN}" in vars(Reader)


def _is_real(atom: Any) -> bool:
    return not isinstance(atom, Literal) and np.dtype(atom.aval.dtype).kind in "fV"


def _operand(var: Any, labels: list[int]) -> Operand:
    return Operand(Here(var), tuple(labels), tuple(var.aval.shape), var.aval.dtype)


def _without_last_axis(index):
    return index[..., 0]


def _uses(scope: Scope, var: Any) -> int:
    inputs = [v for eqn in scope.jaxpr.eqns for v in eqn.invars]
    return sum(v is var for v in (*inputs, *scope.jaxpr.outvars))


def _laid_out(terms: list[Term] | None, step: Layout) -> list[Term] | None:
    if terms is None:
        return None
    out: list[Term] = []
    for term in terms:
        if step.kind == "transpose" and isinstance(term, Product) and not term.layout:
            out.append(dataclasses.replace(term, core=tuple(term.core[i] for i in step.data)))
        else:
            out.append(dataclasses.replace(term, layout=(*term.layout, step)))
    return out


def _sliced(term: Product, label: int, cut: tuple[int, int, int]) -> Product | None:
    sides = []
    for side in (term.lhs, term.rhs):
        if side.rows is not None and side.rows.label == label:
            return None
        if label in side.labels:
            if any(label == old for old, *_ in side.slices):
                return None
            side = dataclasses.replace(side, slices=(*side.slices, (label, *cut)))
        sides.append(side)
    return dataclasses.replace(term, lhs=sides[0], rhs=sides[1])


def _through_scan(term: Term, eqn: Any, body: Scope, stacked: bool) -> Term | None:
    """The term as seen outside the scan: one for each iteration, stacked or summed."""
    if isinstance(term, Carried) or (isinstance(term, Region) and not stacked):
        return None
    deeper = tuple(step._replace(depth=step.depth + 1) for step in term.layout)
    if isinstance(term, Region):
        return dataclasses.replace(
            term,
            eqns=(*term.eqns, eqn),
            shape=(eqn.params["length"], *term.shape),
            layout=deeper,
        )
    consts, carried = scan_arity(eqn)
    label = next(_fresh)
    sides = [
        _operand_through_scan(side, eqn, body, label, consts, carried)
        for side in (term.lhs, term.rhs)
    ]
    if all(label not in side.labels for side in sides):
        return None
    core_labels = (label, *term.core) if stacked else term.core
    layout = deeper if stacked else term.layout
    return dataclasses.replace(term, lhs=sides[0], rhs=sides[1], core=core_labels, layout=layout)


def _operand_through_scan(side, eqn, body, label, consts, carried) -> Operand:
    if isinstance(side.place, Here) and side.place.var in body.jaxpr.invars:
        i = body.jaxpr.invars.index(side.place.var)
        if i < consts:  # the same in every iteration
            return dataclasses.replace(side, place=Here(eqn.invars[i]))
        place = Here(eqn.invars[i]) if i >= consts + carried else Inside(eqn, side.place)
    else:
        place = Inside(eqn, side.place)
    return dataclasses.replace(
        side,
        place=place,
        labels=(label, *side.labels),
        sizes=(eqn.params["length"], *side.sizes),
        stack=side.stack + 1,
    )
