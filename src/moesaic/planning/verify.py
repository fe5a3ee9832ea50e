"""Is a plan sound? Found by walking it, with no code of `plan.py` or `mixture.py`: the second pair of eyes.

The walk carries what travels (dtype of the logits, encoding, layout, id space) and a tally of duties, and compares each
stage with the contract of the kernel that it names.
"""

from __future__ import annotations

from collections.abc import Sequence

from moesaic.contracts.contract import Contract
from moesaic.contracts.plan import HELD, LayerPlan, MixtureNeed, MixturePath, ModelPlan, PerPhase, Stage, Wishes

OWN = frozenset({"gate", "cast", "pack", "encode", "requantise", "decode", "gather", "localise", "scale", "shared"})
"""Stages that are ours and have no contract."""
PLAIN = frozenset({"route", "experts", "finish", "combine", "scale", "shared"})
"""Stages that leave rows in the model's own dtype."""
ROUNDING_ASKED = {"bf16": ("bf16",), "fp8_group128": ("bf16", "fp8_group128"), "fp8_token": ("bf16", "fp8_token"),
                  "fp8_tensor": ("bf16", "fp8_tensor", "fp8_group128"), "mxfp8": ("bf16", "mxfp8"),
                  "nvfp4": ("bf16", "nvfp4")}  # fmt: skip


RUN_NOW = frozenset({"gate", "route", "dispatch", "encode", "experts", "combine", "shared"})
"""Stages that exist as code; the others need the user's `hypothetical`."""
ANY = Wishes(hypothetical=True)


def verify(path: MixturePath, need: MixtureNeed, catalogue: Sequence[Contract], wishes: Wishes = ANY) -> list[str]:
    """Everything that is wrong with a path, in words; empty if it is sound."""
    walk = Walk(path, need, catalogue, wishes)
    for stage in path.stages:
        walk.step(stage)
    return walk.end()


def verify_layer(layer: LayerPlan, needs: Sequence[MixtureNeed], catalogue: Sequence[Contract],
                 wishes: Wishes = ANY) -> list[str]:  # fmt: skip
    """The same of a layer. needs: what its mixture asks, of each of its cells in turn."""
    asked = [(need.phase, need.tokens) for need in needs]
    if [(cell.phase, cell.tokens) for cell in layer.cells] != asked:
        return [f"layer {layer.layers[0]} has not a cell for each of {asked}"]
    wrong = []
    for cell, need in zip(layer.cells, needs, strict=True):
        walk = Walk(cell.path, need, catalogue, wishes)
        for stage in cell.path.stages:
            walk.step(stage)
        wrong += [f"{cell.phase}: {each}" for each in walk.end()]
        if cell.packed not in walk.packings:
            wrong.append(f"{cell.phase}: its kernel does not take weights as {cell.packed}")
        if cell.packed.gate_up != HELD and not wishes.hypothetical:
            wrong.append(f"{cell.phase}: weights held as {cell.packed} are not built")
    if len({cell.packed for cell in layer.cells}) > 1 + wishes.two_layouts:
        wrong.append("the weights would be held twice, and nobody asked for it")
    if len({stage.encoding for cell in layer.cells for stage in cell.path.stages if stage.role == "gate"}) > 1:
        wrong.append("one gate computes in two dtypes")
    return wrong


def verify_model(plan: ModelPlan, needs: dict[int, list[MixtureNeed]], catalogue: Sequence[Contract]) -> list[str]:
    """The same of a model. needs: of each mixture layer, by its index."""
    wrong, wishes = [], plan.wishes
    for layer in plan.layers:
        for index in layer.layers:
            wrong += verify_layer(layer, needs.get(index, []), catalogue, wishes)
        cached = [c for c in catalogue if c.op == "attend_paged" and c.backend == layer.attention and plan.kv in c.kv]
        if not cached:
            wrong.append(f"layer {layer.layers[0]}: {layer.attention} does not read a cache in {plan.kv}")
    if not plan.kv == plan.base.kv == wishes.kv:
        wrong.append(f"a cache in {plan.kv}, where {wishes.kv} was asked for")
    for need, choices in plan.ops.items():
        for choice in choices:
            named = [c for c in catalogue if c.op == choice.op and c.backend == choice.chosen]
            if all(c.misses(need) or not (c.built or wishes.hypothetical) for c in named):
                wrong.append(f"{choice.op} by {choice.chosen} serves no layer that asks for {need.format} weights")
    return wrong


class Walk:
    def __init__(self, path: MixturePath, need: MixtureNeed, catalogue: Sequence[Contract], wishes: Wishes) -> None:
        self.path, self.need, self.catalogue, self.wishes = path, need, catalogue, wishes
        self.lossy = wishes.lossy
        self.packings: set[object] = set()
        self.wrong: list[str] = []
        self.seen: list[str] = []
        self.tally: dict[str, int] = {}
        self.logits: str | None = None
        self.rows = ("bf16", "tokens", "none")  # encoding, layout, ids
        self.sent: str | None = None

    def say(self, text: str) -> None:
        self.wrong.append(text)

    def step(self, stage: Stage) -> None:
        for duty in stage.does:
            self.tally[duty] = self.tally.get(duty, 0) + 1
        if stage.role in OWN:
            getattr(self, f"on_{stage.role}")(stage)
        else:
            self.on_kernel(stage)
        if stage.role not in RUN_NOW and not self.wishes.hypothetical:
            self.say(f"{stage.role} is not built")
        if stage.role in PLAIN and stage.encoding != "bf16":
            self.say(f"{stage.role} leaves {stage.encoding} rows, where rows are plain")
        if stage.role not in ("gate", "cast"):
            self.rows = (stage.encoding, stage.layout, stage.ids)
        if not stage.exact and not self.lossy and stage.role not in ("cast",):
            self.say(f"{stage.role} rounds, and nobody asked for it")
        self.seen.append(stage.role)

    # --- our own stages ---

    def on_gate(self, stage: Stage) -> None:
        self.logits = stage.encoding
        self.asked_for("router_dtype", stage.encoding)

    def asked_for(self, name: str, got: str) -> None:
        wish = getattr(self.wishes, name)
        if isinstance(wish, PerPhase):
            wish = wish.decode if self.need.phase == "decode" else wish.prefill
        if wish is not None and wish != got:
            self.say(f"{name}: {wish} was asked for, and {got} is planned")

    def on_cast(self, stage: Stage) -> None:
        if self.logits == stage.encoding or "cast" in self.seen:
            self.say("a cast of the logits that changes nothing, or a second one")
        self.logits = stage.encoding

    def on_pack(self, stage: Stage) -> None:
        self.keeps(stage, encoding=True, layout=True)
        if "route" not in self.seen or {"pack", "dispatch"} & set(self.seen):
            self.say("packs something else than what routing has just left")
        if stage.exact:
            self.say("packing rounds the weights of the experts, but is called exact")

    def on_encode(self, stage: Stage) -> None:
        self.keeps(stage, layout=True)
        if "dispatch" not in self.seen and not self.wishes.hypothetical:
            self.say("rows are encoded before they are sent, which is not built")
        if self.rows[0] != "bf16" or stage.encoding == "bf16":
            self.say(f"encodes {self.rows[0]} rows as {stage.encoding}")

    def on_requantise(self, stage: Stage) -> None:
        self.keeps(stage, layout=True)
        if (self.rows[0], stage.encoding) != ("fp8_group128", "fp8_tensor"):
            self.say(f"cannot requantise {self.rows[0]} as {stage.encoding}")

    def on_decode(self, stage: Stage) -> None:
        self.keeps(stage, layout=True)
        if stage.encoding != "bf16" or self.rows[0] == "bf16":
            self.say(f"decodes {self.rows[0]} to {stage.encoding}")
        if self.rows[0] != "mxfp8" and stage.exact:
            self.say(f"decoding {self.rows[0]} to BF16 rounds, but is called exact")

    def on_gather(self, stage: Stage) -> None:
        self.keeps(stage, encoding=True)
        if self.rows[1] != "tokens" or stage.layout == "tokens":
            self.say(f"gathers {self.rows[1]} rows as {stage.layout}")

    def on_localise(self, stage: Stage) -> None:
        self.keeps(stage, encoding=True, layout=True, ids=False)
        if self.rows[2] != "global" or stage.ids != "local":
            self.say(f"turns {self.rows[2]} ids into {stage.ids} ones")

    def on_scale(self, stage: Stage) -> None:
        self.after_combine(stage)

    def on_shared(self, stage: Stage) -> None:
        self.after_combine(stage)

    def after_combine(self, stage: Stage) -> None:
        if "combine" not in self.seen:
            self.say(f"{stage.role} before the rows are back")

    def keeps(self, stage: Stage, encoding: bool = False, layout: bool = False, ids: bool = True) -> None:
        names = ("encoding", "layout", "ids")
        now = (stage.encoding, stage.layout, stage.ids)
        for name, held, before, after in zip(names, (encoding, layout, ids), self.rows, now, strict=True):
            if held and before != after:
                self.say(f"{stage.role} changes {name} from {before} to {after}")

    # --- stages that a contract describes ---

    def on_kernel(self, stage: Stage) -> None:
        op = "dispatch" if stage.role == "combine" else stage.role
        named = [c for c in self.catalogue if c.op == op and c.backend == stage.kernel]
        if not named:
            self.say(f"{stage.role}: no contract of {stage.kernel}")
            return
        reasons = [self.against(stage, contract) for contract in named]
        if all(reasons):
            self.say(min((reason for reason in reasons if reason), key=len))
        if stage.role in ("experts", "dispatch"):
            self.asked_for(stage.role, stage.kernel)
        if stage.role == "experts":
            self.packings = {c.packed for c, reason in zip(named, reasons, strict=True) if not reason}
        if stage.role == "dispatch":
            self.sent = stage.kernel
            self.asked_for("wire", stage.encoding)

    def against(self, stage: Stage, contract: Contract) -> str | None:
        """Why this variant of the kernel cannot be what the stage says; None if it can."""
        check = {"route": self.route, "dispatch": self.dispatch, "experts": self.experts, "finish": self.finish,
                 "combine": self.combine}[stage.role]  # fmt: skip
        return self.ever(stage, contract) or check(stage, contract)

    def ever(self, stage: Stage, contract: Contract) -> str | None:
        """Why it cannot, wherever the stage stands."""
        path, need = contract.path, self.need
        does, can = path.combine_does if stage.role == "combine" else path.does, path.can
        if stage.role == "dispatch":
            does, can = frozenset(), frozenset()
        duties = need.duties()
        if not does & duties <= stage.does or not stage.does <= (does | can):
            return f"{stage.role} {stage.kernel} does {sorted(stage.does)}, its contract says {sorted(does)}"
        if stage.role != "combine" and (reason := contract.misses(need.need)):
            return f"{stage.kernel} {reason}"
        if not (contract.built or self.wishes.hypothetical):
            return f"{stage.kernel} is not built"
        return self.sizes(stage, contract)

    def sizes(self, stage: Stage, contract: Contract) -> str | None:
        limits, need = contract.limits, self.need
        groups = need.groups_kept if contract.path.routes or contract.op == "route" else 0
        bounds = ((need.top_k, limits.max_top_k), (need.tokens, limits.max_tokens), (need.ranks, limits.max_ranks),
                  (need.experts, limits.max_experts), (groups, limits.max_groups_kept))
        if any(most is not None and value > most for value, most in bounds) or need.ranks < limits.min_ranks:
            return f"{stage.kernel} is not made for these sizes"
        whole = need.hidden % limits.hidden_multiple == 0 and need.width % limits.width_multiple == 0
        if not whole or (limits.hidden_in and need.hidden not in limits.hidden_in):
            return f"{stage.kernel} does not take {need.hidden} x {need.width}"
        return None

    def route(self, stage: Stage, contract: Contract) -> str | None:
        if self.logits not in contract.logits:
            return f"{stage.kernel} does not take logits in {self.logits}"
        if stage.ids != "global":
            return "routing gives global ids"
        if not self.routes_so(contract):
            return f"{stage.kernel} does not route this way"
        bias = self.need.router_bias
        return f"{stage.kernel} would misread a bias in {bias}" if bias and bias not in contract.router_bias else None

    def routes_so(self, contract: Contract) -> bool:
        need, of = self.need, contract
        grouped = not need.groups_kept or (of.groups and need.group_score in of.group_scores)
        return need.scoring in of.scorings and need.renormalize in of.renormalizes and grouped

    def dispatch(self, stage: Stage, contract: Contract) -> str | None:
        path, need, wire = contract.path, self.need, stage.encoding
        if wire not in contract.encodings:
            return f"{stage.kernel} does not carry {wire}"
        if not self.lossy and wire not in ROUNDING_ASKED[need.need.encoding]:
            return f"a wire in {wire} for rows in {need.need.encoding}"
        if wire == "fp8_tensor" and need.ranks > 1 and not need.static:
            return f"a wire in {wire}, whose one scale each rank would find for itself"
        if self.rows[0] != ("bf16" if path.encodes else wire):
            return f"{stage.kernel} is given {self.rows[0]} for a wire in {wire}"
        if stage.layout != path.emits or self.rows[1] != "tokens":
            return f"{stage.kernel} leaves {path.emits} rows, not {stage.layout}"
        left = path.ids if need.ranks > 1 else "local"  # one rank's global ids are its local ones
        return f"{stage.kernel} leaves {left} ids, not {stage.ids}" if stage.ids != left else None

    def experts(self, stage: Stage, contract: Contract) -> str | None:
        path, need = contract.path, self.need
        if path.routes and ("route" in self.seen or self.logits not in contract.logits or need.ranks > 1):
            return f"{stage.kernel} routes itself and is given something else than its logits"
        if path.routes and need.router_bias and need.router_bias not in contract.router_bias:
            return f"{stage.kernel} would misread a bias in {need.router_bias}"
        if path.routes and not self.routes_so(contract):
            return f"{stage.kernel} does not route this way"
        plain = stage.layout == "tokens" and stage.does <= {"weights", "reduce"}
        if not self.wishes.hypothetical and (path.routes or not plain):
            return f"nothing runs {stage.kernel} so yet"
        if not path.routes and "route" not in self.seen:
            return f"{stage.kernel} is given no routing"
        if (path.routing == "packed") != ("pack" in self.seen):
            return f"{stage.kernel} takes routing as a {path.routing} value"
        if self.rows[0] != need.need.encoding:
            return f"{stage.kernel} is given {self.rows[0]} rows, not {need.need.encoding}"
        if self.rows[1] != path.layout or stage.layout != path.emits:
            return f"{stage.kernel} takes {path.layout} rows and leaves {path.emits}"
        if need.ranks > 1 and self.rows[2] != path.ids:
            return f"{stage.kernel} takes {path.ids} ids and is given {self.rows[2]} ones"
        return None if stage.ids == self.rows[2] else f"{stage.kernel} changes the id space"

    def finish(self, stage: Stage, contract: Contract) -> str | None:
        legal = stage.layout == "tokens" and self.rows[1] != "tokens" and "experts" in self.seen
        legal = legal and stage.ids == self.rows[2]
        return None if legal else "finishing turns rows of experts into rows of tokens"

    def combine(self, stage: Stage, contract: Contract) -> str | None:
        if stage.kernel != self.sent:
            return f"sent by {self.sent}, brought back by {stage.kernel}"
        if self.rows[1] not in contract.path.combines:
            return f"{stage.kernel} takes no {self.rows[1]} rows back"
        return None if (stage.layout, stage.ids) == ("tokens", "none") else "combining leaves token rows"

    # --- the whole ---

    def end(self) -> list[str]:
        duties = self.need.duties()
        for duty in sorted(duties | set(self.tally)):
            if self.tally.get(duty, 0) != (duty in duties):
                self.say(f"{duty} is done {self.tally.get(duty, 0)} times")
        order = [role for role in self.seen if role in ("gate", "dispatch", "experts", "combine")]
        if order != ["gate", "dispatch", "experts", "combine"]:
            self.say(f"stages out of order: {' '.join(self.seen)}")
        if self.rows[:2] != ("bf16", "tokens"):
            self.say(f"ends with {self.rows[0]} {self.rows[1]}")
        self.shared()
        return self.wrong

    def shared(self) -> None:
        """A shared expert among the others weighs 1 where the factor is in the weights, 1/factor where it follows."""
        fused = any("shared" in stage.does and stage.role == "experts" for stage in self.path.stages)
        late = any("factor" in stage.does and stage.role == "scale" for stage in self.path.stages)
        wanted = (1 / self.need.factor if late else 1.0) if fused else None
        if self.path.shared_weight != wanted:
            self.say(f"the shared expert weighs {self.path.shared_weight}, not {wanted}")
