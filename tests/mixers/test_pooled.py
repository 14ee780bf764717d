"""Pooled and landmark mixers against the authors' own modules, and against loops that spell the formulas out."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
import torch.nn.functional as F
from safetensors import safe_open

from flatten_diffusion.mixers import (
    AgentAttention,
    AgentConfig,
    Context,
    GlobalQueryAttention,
    GlobalQueryConfig,
    LayerShape,
    LookupAttention,
    LookupConfig,
    Mixer,
    SelfGuidedAttention,
    SelfGuidedConfig,
    SemanticTokenConfig,
    SoftConfig,
    SuperTokenConfig,
    TokenMergeConfig,
    create_mixer,
)
from flatten_diffusion.mixers.parts.pooling import cells_of, tokens_of

from .registered import stirred, tensors

GOLDEN = Path(__file__).parents[3] / "shared" / "golden" / "mechanisms"


def golden(name: str) -> pytest.MarkDecorator:
    """A test of every case of the authors' outputs that is here, by its name; skipped where there is none."""
    found = sorted(path.stem for path in GOLDEN.glob(f"{name}_case*.safetensors"))
    absent = pytest.mark.skip(reason="the authors' outputs (../shared/golden) are not here")
    return pytest.mark.parametrize("case", found or [pytest.param(name, marks=absent)])


class Golden:
    """The tensors of one of the authors' cases, its settings, and gradients by its cotangent."""

    def __init__(self, name: str) -> None:
        with safe_open(GOLDEN / f"{name}.safetensors", framework="pt") as file:
            self.saved = {key: file.get_tensor(key) for key in file.keys()}  # noqa: SIM118
            self.meta = file.metadata()
        self.learned = {
            name: tensor.requires_grad_()
            for name, tensor in self.saved.items()
            if name != "out" and self.gradient(name) in self.saved
        }

    @staticmethod
    def gradient(name: str) -> str:
        return name.replace("param.", "grad.") if name.startswith("param.") else f"grad_{name}"

    def __getitem__(self, name: str) -> torch.Tensor:
        return self.saved[name]

    def get(self, name: str) -> torch.Tensor | None:
        return self.saved.get(name)

    def linear(self, name: str, x: torch.Tensor) -> torch.Tensor:
        return F.linear(x, self[f"{name}.weight"].flatten(1), self.get(f"{name}.bias"))

    def number(self, name: str) -> int:
        return int(self.meta[name])

    def sides(self, name: str = "grid") -> tuple[int, int]:
        first, second = self.meta[name].split("x")
        return int(first), int(second)

    def check(self, out: torch.Tensor) -> None:
        """Its output and every gradient, to 1e-9 of the largest."""
        assert self.learned
        grads = torch.autograd.grad(out, list(self.learned.values()), self["grad_out"])
        for name, ours in {"out": out, **dict(zip(self.learned, grads, strict=True))}.items():
            theirs = self[name if name == "out" else self.gradient(name)]
            assert (ours - theirs).abs().max() <= 1e-9 * max(1.0, float(theirs.abs().max())), name


def softmax(query: torch.Tensor, key: torch.Tensor, value: torch.Tensor, scale: float) -> torch.Tensor:
    """Plain attention, [B, N, H, D]."""
    weights = (torch.einsum("bnhd,bmhd->bhnm", query, key) * scale).softmax(-1)
    return torch.einsum("bhnm,bmhd->bnhd", weights, value)


@golden("tome_sd")
def test_token_merging_is_the_authors(case: str) -> None:
    saved = Golden(case)
    ratio, rows, columns = float(saved.meta["ratio"]), saved.number("sy"), saved.number("sx")
    mixer = create_mixer(
        TokenMergeConfig(ratio=ratio, rows=rows, columns=columns),
        LayerShape(1, saved.number("dim"), saved.number("dim")),
    )
    x = saved["x"]
    for compute in (mixer, mixer.reference):
        mixer.choice = saved["buffer.dst_choice"].long()
        saved.check(compute(*[x[:, :, None]] * 3, Context(saved.sides(), hidden_states=x)).output[:, :, 0])


def test_token_merging_token_by_token() -> None:
    """Nothing but loops: cells of 2 x 2 on 3 x 5 tokens, whose last row and column have no destination."""
    grid, shape = (3, 5), LayerShape(2, 4, 8)
    query, key, value, context = tensors(grid, shape, batch=1)
    hidden = context.hidden_states[0]
    chosen = [0, 2]
    best = {
        n: max((float(F.cosine_similarity(hidden[n], hidden[m], dim=0)), m) for m in chosen)
        for n in range(15)
        if n not in chosen
    }
    merged = sorted(best, key=lambda n: -best[n][0])[:6]
    groups = [[m] + [n for n in merged if best[n][1] == m] for m in chosen]
    groups += [[n] for n in best if n not in merged]
    expected = torch.zeros_like(value)
    for members in groups:
        for head in range(2):
            mean = query[0, members, head].mean(0)
            scores = torch.stack([mean @ key[0, g, head].mean(0) * 0.5 for g in groups]).softmax(0)
            answer = sum(w * value[0, g, head].mean(0) for w, g in zip(scores, groups, strict=True))
            expected[0, members, head] = answer
    mixer = create_mixer(TokenMergeConfig(ratio=0.4), shape)
    torch.testing.assert_close(mixer(query, key, value, context).output, expected, rtol=1e-9, atol=1e-9)


@golden("soft")
def test_soft_is_the_authors(case: str) -> None:
    saved = Golden(case)
    heads, dim = saved.number("heads"), saved.number("dim")
    config = SoftConfig(saved.number("ratio"), saved.number("conv_size"), saved.number("max_iter"))
    mixer = create_mixer(config, LayerShape(heads, dim // heads, dim), dtype=torch.float64)
    given = {"landmark_weight": "Qlandmark_op.weight", "norm_weight": "Qnorm_act.0.weight"}
    given |= {"norm_bias": "Qnorm_act.0.bias", "conv_weight": "conv.weight"}
    for name, theirs in given.items():
        delattr(mixer, name)
        setattr(mixer, name, saved[f"param.attn.{theirs}"])
    for compute in (mixer, mixer.reference):
        one, value = (saved.linear(f"param.W_{name}", saved["x"]).unflatten(-1, (heads, -1)) for name in "qv")
        out = compute(one, one, value, Context(saved.sides())).output
        saved.check(saved.linear("param.ff", out.flatten(2)))


@golden("stvit_super_token")
def test_super_tokens_are_the_authors(case: str) -> None:
    saved = Golden(case)
    heads, (height, width), (rows, columns) = saved.number("heads"), saved.sides(), saved.sides("stoken_size")
    shape = LayerShape(heads, saved.number("dim") // heads, saved.number("dim"))
    mixer = create_mixer(SuperTokenConfig(rows, columns, saved.number("n_iter"), True), shape)
    grid = (height + -height % rows, width + -width % columns)  # theirs: zeros around, which count as tokens
    for compute in (mixer, mixer.reference):
        x = F.pad(saved["x"], (0, -width % columns, 0, -height % rows)).flatten(2).transpose(1, 2)
        qkv = saved.linear("param.stoken_refine.qkv", x).unflatten(-1, (heads, 3, -1)).unbind(3)
        context = Context(grid, hidden_states=x)
        out = compute(*qkv, context).output.flatten(2)
        kept = mixer(qkv[0], qkv[1], torch.ones_like(qkv[2]), context).output[:, :, 0, :1]  # of theirs, after `proj`
        out = (
            F.linear(out, saved["param.stoken_refine.proj.weight"].flatten(1))
            + kept * saved["param.stoken_refine.proj.bias"]
        )
        saved.check(out.transpose(1, 2).unflatten(2, grid)[..., :height, :width])


@golden("lookupvit")
def test_lookup_is_the_public_block(case: str) -> None:
    """A third party's block, whose streams and projections are around the mixer's two ways."""
    saved = Golden(case)
    heads = saved.number("heads")

    def norm(x: torch.Tensor, name: str) -> torch.Tensor:
        return F.layer_norm(x, x.shape[-1:]) * (saved[f"param.{name}.gamma"] + 1)

    def project(x: torch.Tensor, name: str) -> torch.Tensor:
        return saved.linear(f"param.{name}", x).unflatten(-1, (heads, -1)).transpose(1, 2)

    def merge(x: torch.Tensor, name: str) -> torch.Tensor:
        return saved.linear(f"param.{name}", x.transpose(1, 2).flatten(2))

    few, tokens, scale = saved["c"], saved["x"], saved.number("dim_head") ** -0.5
    query = project(norm(few, "gather.norm"), "gather.to_q")
    key, value = (project(norm(tokens, "gather.norm_context"), f"gather.to_{n}") for n in "kv")
    few = few + merge(LookupAttention.look_up(query, key, value, None, scale), "gather.to_out.1")
    inner = norm(few, "self_attn.norm")
    inner = LookupAttention.look_up(*(project(inner, f"self_attn.to_{n}") for n in "qkv"), None, scale)
    few = few + merge(inner, "self_attn.to_out.1")
    values = project(norm(few, "scatter.norm_context"), "scatter.to_v")
    tokens = tokens + merge(LookupAttention.hand_back(key, query, values, scale), "scatter.to_out.1")
    saved.check(torch.cat([few, tokens], dim=1))


def test_soft_inverts_where_landmarks_are_all_tokens() -> None:
    """G(q, L) G(L, L)^-1 G(L, k) written out with a solver, and landmarks with loops, on a grid that is no multiple."""
    shape, grid = LayerShape(2, 4, 8), (3, 5)
    mixer = stirred(SoftConfig(ratio=2, kernel_size=0, iterations=60), shape)
    query, key, value, context = tensors(grid, shape, batch=1)
    found = mixer(query, key, value, context).output
    for head in range(2):
        q, k, v = (x[0, :, head] for x in (query, key, value))
        q, k = q * 4**-0.25, k * 4**-0.25
        landmarks = []
        for i in range(2):
            for j in range(3):
                total = torch.zeros(4, dtype=torch.float64)
                for y in range(2):
                    for x in range(2):
                        n = min(2 * i + y, 2) * 5 + min(2 * j + x, 4)
                        total = total + mixer.landmark_weight[:, :, y, x] @ ((q[n] + k[n]) / 2)
                total = (total - total.mean()) / (total.var(correction=0) + 1e-5).sqrt()
                landmarks.append(F.gelu(total * mixer.norm_weight + mixer.norm_bias))
        few = torch.stack(landmarks)
        to_q, to_k, among = ((-torch.cdist(x, few).square() / 2).exp() for x in (q, k, few))
        expected = to_q @ torch.linalg.solve(among + 0.01 * torch.eye(6), to_k.T @ v)
        torch.testing.assert_close(found[0, :, head], expected, rtol=1e-7, atol=1e-7)


def test_super_tokens_cell_by_cell() -> None:
    """Three cells of two columns on 1 x 5 tokens: the first and the last are no neighbours."""
    shape = LayerShape(1, 3, 3)
    query, key, value, context = tensors((1, 5), shape, batch=1)
    hidden, of = context.hidden_states[0], [0, 0, 1, 1, 2]
    cells = [hidden[[0, 1]].mean(0), hidden[[2, 3]].mean(0), hidden[4]]
    shares = torch.zeros(5, 3, dtype=torch.float64)
    for n in range(5):
        near = [s for s in range(3) if abs(s - of[n]) <= 1]
        shares[n, near] = torch.stack([hidden[n] @ cells[s] * 3**-0.5 for s in near]).softmax(0)
    q, k, v = ((shares.T @ x[0, :, 0]) / shares.sum(0)[:, None] for x in (query, key, value))
    expected = shares @ (q @ k.T * 3**-0.5).softmax(-1) @ v
    mixer = create_mixer(SuperTokenConfig(columns=2), shape)
    torch.testing.assert_close(mixer(query, key, value, context).output[0, :, 0], expected, rtol=1e-9, atol=1e-9)


def test_lookup_token_by_token() -> None:
    """Two by two compressed tokens of 4 x 4 are the middles between four tokens."""
    shape = LayerShape(1, 3, 3)
    mixer = create_mixer(LookupConfig(side=2), shape, dtype=torch.float64)
    with torch.no_grad():
        mixer.gate.fill_(0.4)
    query, key, value, context = tensors((4, 4), shape, batch=1)
    q, k, v = (x[0, :, 0] for x in (query, key, value))
    middles = [[0, 1, 4, 5], [2, 3, 6, 7], [8, 9, 12, 13], [10, 11, 14, 15]]
    few_q, few_k = (torch.stack([x[tokens].mean(0) for tokens in middles]) for x in (q, k))
    seen = torch.stack([(k @ row * 3**-0.5).softmax(0) @ v for row in few_q])
    seen = seen + 0.4 * torch.stack([(few_k @ row * 3**-0.5).softmax(0) @ seen for row in few_q])
    expected = torch.stack([(few_q @ row * 3**-0.5).softmax(0) @ seen for row in k])
    torch.testing.assert_close(mixer(query, key, value, context).output[0, :, 0], expected, rtol=1e-9, atol=1e-9)


@golden("agentsd_merge")
def test_agents_of_merged_tokens_are_the_authors(case: str) -> None:
    saved = Golden(case)
    heads, dim = saved.number("heads"), saved.number("dim")
    numbers = {"agent_ratio": "agent_ratio", "merge_ratio": "ratio", "sharpness": "k_scale2", "shortcut": "k_shortcut"}
    config = AgentConfig(
        kernel_size=0,
        rows=saved.number("sy"),
        columns=saved.number("sx"),
        **{ours: float(saved.meta[theirs]) for ours, theirs in numbers.items()},
    )
    mixer = create_mixer(config, LayerShape(heads, dim // heads, dim), dtype=torch.float64)
    for compute in (mixer, mixer.reference):
        qkv = (saved.linear(f"param.to_{name}", saved["x"]).unflatten(-1, (heads, -1)) for name in "qkv")
        out = compute(*qkv, Context(saved.sides(), hidden_states=saved["x"])).output
        saved.check(saved.linear("param.to_out.0", out.flatten(2)))


@golden("agentsd")
def test_given_agents_are_the_authors(case: str) -> None:
    saved = Golden(case)
    heads, dim = saved.number("heads"), saved.number("dim")
    sharpness, shortcut = float(saved.meta["k_scale2"]), float(saved.meta["k_shortcut"])
    config = AgentConfig(kernel_size=0, agent_ratio=0.5, sharpness=sharpness, shortcut=shortcut)
    mixer = create_mixer(config, LayerShape(heads, dim // heads, dim), dtype=torch.float64)
    assert isinstance(mixer, AgentAttention)
    given = (("q", "x"), ("q", "agent"), ("k", "x"), ("v", "x"))
    heads_first = (
        saved.linear(f"param.to_{layer}", saved[name]).unflatten(-1, (heads, -1)).transpose(1, 2)
        for layer, name in given
    )
    out = mixer.through(*heads_first, None, Context())
    saved.check(saved.linear("param.to_out.0", out.transpose(1, 2).flatten(2)))


def test_agents_of_merged_tokens_token_by_token() -> None:
    """One destination, the first of 2 x 3 tokens: of the five others one joins it, for the agents all but one do."""
    shape, config = LayerShape(1, 4, 4), {"rows": 2, "columns": 3, "sharpness": 0.5, "shortcut": 0.2, "kernel_size": 0}
    mixer = create_mixer(AgentConfig(agent_ratio=0.7, merge_ratio=0.2, **config), shape, dtype=torch.float64)
    query, key, value, context = tensors((2, 3), shape, batch=1)
    hidden = context.hidden_states[0]
    order = sorted(range(1, 6), key=lambda n: -float(F.cosine_similarity(hidden[n], hidden[0], dim=0)))
    groups, agents = [[0, order[0]], *([n] for n in order[1:])], [[0, *order[:4]], [order[4]]]
    q, k, v = (torch.stack([x[0, members, 0].mean(0) for members in groups]) for x in (query, key, value))
    a = torch.stack([query[0, members, 0].mean(0) for members in agents])
    out = (q @ a.T * 4**-0.25).softmax(-1) @ ((a @ k.T * 4**-0.5).softmax(-1) @ v) + 0.2 * v
    expected = torch.zeros(6, 4, dtype=torch.float64)
    for members, answer in zip(groups, out, strict=True):
        expected[members] = answer
    torch.testing.assert_close(mixer(query, key, value, context).output[0, :, 0], expected, rtol=1e-9, atol=1e-9)
    # with as many agents as half the tokens, it is the softmax over merged tokens
    plain = create_mixer(AgentConfig(agent_ratio=0.4, merge_ratio=0.2, **config), shape)
    merged = create_mixer(TokenMergeConfig(0.2, 2, 3), shape)
    torch.testing.assert_close(plain(query, key, value, context).output, merged(query, key, value, context).output)


def test_semantic_tokens_one_by_one() -> None:
    shape = LayerShape(1, 3, 3)
    mixer = stirred(SemanticTokenConfig(side=2), shape)
    query, key, value, context = tensors((2, 4), shape, batch=1)
    q, k, v = (x[0, :, 0] for x in (query, key, value))
    keys, values = [], []
    for number, cell in enumerate([[0, 1], [2, 3], [4, 5], [6, 7]]):
        weights = (k @ (q[cell].mean(0) + mixer.centres[0, number]) * 3**-0.5).softmax(0)
        keys.append(weights @ k)
        values.append(weights @ v)
    expected = torch.stack([(torch.stack(keys) @ row * 3**-0.5).softmax(0) @ torch.stack(values) for row in q])
    torch.testing.assert_close(mixer(query, key, value, context).output[0, :, 0], expected, rtol=1e-9, atol=1e-9)


def _global_queries(saved: Golden, prefix: str) -> GlobalQueryAttention:
    heads, dim = saved.number("heads"), saved.number("dim")
    steps = int(saved.meta.get("n_featextract", 1))
    config = GlobalQueryConfig(saved.number("window"), steps, "False" in saved.meta.get("keep_dim", ""))
    mixer = create_mixer(config, LayerShape(heads, dim // heads, dim), dtype=torch.float64)
    assert isinstance(mixer, GlobalQueryAttention)
    del mixer.bias_table
    mixer.bias_table = saved[f"param.{prefix}relative_position_bias_table"]
    if prefix:
        names = {"depthwise": "0", "squeeze": "2.fc.0", "excite": "2.fc.2", "pointwise": "3"}
        for ours, theirs in names.items():
            parts = [saved[f"param.q_global_gen.to_q_global.{i}.conv.{theirs}.weight"] for i in range(steps)]
            delattr(mixer, ours)
            setattr(
                mixer, ours, torch.stack(parts).reshape(steps, *parts[0].shape[: 2 if ours != "depthwise" else None])
            )
    return mixer


@golden("gcvit_global")
def test_global_queries_are_the_authors(case: str) -> None:
    saved = Golden(case)
    mixer, heads = _global_queries(saved, "attn."), saved.number("heads")
    for compute in (mixer, mixer.reference):
        x = saved["x"].flatten(1, 2)
        key, value = (y.unflatten(-1, (heads, -1)) for y in saved.linear("param.attn.qkv", x).chunk(2, dim=-1))
        out = compute(x.unflatten(-1, (heads, -1)), key, value, Context(saved.sides())).output
        saved.check(saved.linear("param.attn.proj", out.flatten(2)).unflatten(1, saved.sides()))


@golden("gcvit_global_given_query")
def test_global_queries_that_are_given_are_the_authors(case: str) -> None:
    saved = Golden(case)
    mixer, heads = _global_queries(saved, ""), saved.number("heads")
    x = saved["x"].flatten(1, 2)
    key, value = (y.unflatten(-1, (heads, -1)) for y in saved.linear("param.qkv", x).chunk(2, dim=-1))
    out = mixer.ask(saved["q_global"][:, 0], key, value, saved.sides(), Context(saved.sides()))
    saved.check(saved.linear("param.proj", out.flatten(2)).unflatten(1, saved.sides()))


def test_global_queries_place_by_place() -> None:
    """2 x 3 tokens in windows of two: the last one holds one column. The generator with loops over channels."""
    shape = LayerShape(1, 4, 4)
    mixer = stirred(GlobalQueryConfig(window=2), shape)
    query, key, value, context = tensors((2, 3), shape, batch=1)
    t = query[0, :, 0].T.reshape(4, 2, 3)
    padded = F.pad(t, (1, 1, 1, 1))
    u = torch.zeros_like(t)
    for c in range(4):
        for y in range(2):
            for x in range(3):
                u[c, y, x] = F.gelu((padded[c, y : y + 3, x : x + 3] * mixer.depthwise[0, c, 0]).sum())
    gate = (mixer.excite[0] @ F.gelu(mixer.squeeze[0] @ u.mean((1, 2)))).sigmoid()
    t = t + torch.einsum("oc,cyx->oyx", mixer.pointwise[0], u * gate[:, None, None])
    asked = {(y, x): t[:, y, x : x + 2].mean(1) for y in range(2) for x in range(2)}  # cells overlap in the middle
    expected = torch.zeros(6, 4, dtype=torch.float64)
    for y in range(2):
        for x in range(3):
            window = [(b, a) for b in range(2) for a in range(3) if a // 2 == x // 2]
            scores = []
            for b, a in window:
                bias = mixer.bias_table[(y - b + 1) * 3 + x % 2 - a % 2 + 1, 0]
                scores.append(asked[y, x % 2] @ key[0, 3 * b + a, 0] * 0.5 + bias)
            weights = torch.stack(scores).softmax(0)
            expected[3 * y + x] = sum(w * value[0, 3 * b + a, 0] for w, (b, a) in zip(weights, window, strict=True))
    torch.testing.assert_close(mixer(query, key, value, context).output[0, :, 0], expected, rtol=1e-9, atol=1e-9)


@golden("sgformer_guided")
def test_self_guided_groups_are_the_authors(case: str) -> None:
    """Both orders of their tokens, each for half of the heads, and their scalar biases, around the mixer's groups."""
    saved = Golden(case)
    heads, dim, (height, width) = saved.number("heads"), saved.number("dim"), saved.sides()
    lengths = [saved[f"param.f{i}.weight"].numel() for i in (1, 2, 3) if saved.get(f"param.f{i}.weight") is not None]
    middle = lengths[1] if len(lengths) == 3 else 0
    config = SelfGuidedConfig(lengths[0], middle, lengths[-1])
    mixer = create_mixer(config, LayerShape(heads, dim // heads, dim), dtype=torch.float64)
    assert isinstance(mixer, SelfGuidedAttention)
    names = ("low", "middle", "high") if middle else ("low", "high")
    for i, name in enumerate(names, start=1):
        delattr(mixer, f"{name}_weight")
        setattr(mixer, f"{name}_weight", saved[f"param.f{i}.weight"][0])
    x, keys, values = saved["x"], [], []
    across = x.unflatten(1, (height, width)).transpose(1, 2).flatten(1, 2)
    quarters = (1, 2, 1) if middle else (2, 2)
    bias = torch.cat(
        [
            saved[f"param.f{i}.bias"].expand(height * width // 4 * share // length)
            for i, (share, length) in enumerate(zip(quarters, lengths, strict=True), start=1)
        ]
    )
    for layer, tokens, order in ((1, x, "rowmajor"), (2, across, "colmajor")):
        groups, kept = mixer.aggregate(tokens[:, :, None], saved[f"buffer.mask_{order}"], None)
        assert kept.all()
        pair = saved.linear(f"param.kv{layer}", groups[:, :, 0] + bias[:, None]).chunk(2, dim=-1)
        for found, part in zip((keys, values), pair, strict=True):
            found.append(part.unflatten(-1, (heads // 2, -1)))
    query = saved.linear("param.q", x).unflatten(-1, (heads, -1))
    out = softmax(query, torch.cat(keys, dim=2), torch.cat(values, dim=2), (dim // heads) ** -0.5).flatten(2)
    image = saved.linear("param.lepe_linear", x).transpose(1, 2).unflatten(2, (height, width))
    local = F.conv2d(image, saved["param.lepe_conv.weight"], saved["param.lepe_conv.bias"], padding=1, groups=dim)
    saved.check(saved.linear("param.proj", out + local.flatten(2).transpose(1, 2)))


@golden("sgformer_hybrid")
def test_self_guided_significance_is_the_authors(case: str) -> None:
    saved = Golden(case)
    heads, dim, grid, ratio = saved.number("heads"), saved.number("dim"), saved.sides(), saved.number("sr_ratio")
    x, half = saved["x"], heads // 2
    image = x.transpose(1, 2).unflatten(2, grid)
    few = F.conv2d(image, saved["param.sr.weight"], saved["param.sr.bias"], stride=ratio).flatten(2).transpose(1, 2)
    few = F.gelu(F.layer_norm(few, (dim,), saved["param.norm.weight"], saved["param.norm.bias"]))
    scale = (dim // heads) ** -0.5
    with torch.no_grad():
        far, near = (saved.linear(f"param.q{i}", x).unflatten(-1, (half, -1)) * scale for i in (1, 2))
        far_keys, near_keys = (
            saved.linear(f"param.kv{i}", y).chunk(2, dim=-1)[0].unflatten(-1, (half, -1)) for i, y in ((1, few), (2, x))
        )
        every = [torch.ones(y.shape[:2], dtype=torch.bool) for y in (x, few)]
        cells = SelfGuidedAttention.received(far, far_keys, every[1], every[0])
        windows = [cells_of(y, grid, (7, 7)) for y in (near, near_keys, every[0], every[0])]
        own = SelfGuidedAttention.received(*(y.flatten(0, 1) for y in windows)).reshape(windows[2].shape)
        found = tokens_of(own, grid, (7, 7))
        found = found + tokens_of(cells[..., None].expand(-1, -1, ratio**2), grid, (ratio, ratio))
    torch.testing.assert_close(found, saved["aux_mask_rowmajor"], rtol=1e-9, atol=1e-12)


def test_self_guided_token_by_token() -> None:
    """2 x 3 tokens in cells of two: the three that get most are kept, of the others two become one and one stays."""
    shape = LayerShape(1, 4, 4)
    mixer = create_mixer(SelfGuidedConfig(low=2, middle=0, high=1, cell=2), shape, dtype=torch.float64)
    query, key, value, context = tensors((2, 3), shape, batch=1)
    q, k, v = (x[0, :, 0] for x in (query, key, value))
    significance, cells = [0.0] * 6, [[0, 1, 3, 4], [2, 5]]
    for n in range(6):
        to_cells = torch.stack([q[n] @ k[cell].mean(0) * 0.5 for cell in cells]).softmax(0)
        for cell, weight in zip(cells, to_cells, strict=True):
            own = (k[cell] @ q[n] * 0.5).softmax(0) / len(cell)
            for place, m in enumerate(cell):
                significance[m] += float(weight) / 6 + (float(own[place]) if n in cell else 0.0)
    order = sorted(range(6), key=lambda n: significance[n])
    groups = [order[:2], [order[2]], *([n] for n in order[3:])]
    keys, values = (torch.stack([x[members].sum(0) / len(members) for members in groups]) for x in (k, v))
    expected = (q @ keys.T * 0.5).softmax(-1) @ values
    torch.testing.assert_close(mixer(query, key, value, context).output[0, :, 0], expected, rtol=1e-6, atol=1e-6)


def exact(config: object, grid: tuple[int, int] = (4, 6)) -> None:
    """Asserts that a mixer is the softmax."""
    shape = LayerShape(2, 6, 12)
    query, key, value, context = tensors(grid, shape)
    mixer = create_mixer(config, shape, dtype=torch.float64)
    ours = mixer(query, key, value, context._replace(scale=0.3)).output
    torch.testing.assert_close(ours, softmax(query, key, value, 0.3), rtol=1e-9, atol=1e-9)


def test_nothing_merged_is_the_softmax() -> None:
    exact(TokenMergeConfig(ratio=0.0))
    exact(TokenMergeConfig(rows=1, columns=1))
    exact(TokenMergeConfig(rows=5))  # no whole cell


def test_cells_of_one_token_are_the_softmax() -> None:
    exact(SuperTokenConfig(rows=1, columns=1))


def test_groups_of_one_token_are_the_softmax() -> None:
    exact(SelfGuidedConfig(1, 1, 1))
    exact(SelfGuidedConfig(1, 0, 1))


@pytest.mark.parametrize(
    "config",
    [TokenMergeConfig, SoftConfig, SuperTokenConfig, LookupConfig, SemanticTokenConfig],
    ids=lambda config: config.name,
)
def test_grids_are_checked(config: type) -> None:
    shape = LayerShape(2, 6, 12)
    mixer = stirred(config(), shape)
    assert isinstance(mixer, Mixer)
    query, key, value, context = tensors((6, 4), shape)
    for grid, message in (((5, 5), "does not hold 24 tokens"), ((2, 3, 4), "one image"), (None, "one image")):
        with pytest.raises(ValueError, match=message):
            mixer(query, key, value, context._replace(grid=grid))


@pytest.mark.parametrize(
    ("config", "settings"),
    [
        (TokenMergeConfig, {"ratio": 1.0}),
        (TokenMergeConfig, {"ratio": float("nan")}),
        (TokenMergeConfig, {"ratio": True}),
        (TokenMergeConfig, {"rows": 0}),
        (TokenMergeConfig, {"columns": 2.0}),
        (SoftConfig, {"ratio": 1}),
        (SoftConfig, {"ratio": 33}),
        (SoftConfig, {"kernel_size": 4}),
        (SoftConfig, {"iterations": 0}),
        (SuperTokenConfig, {"rows": 0}),
        (SuperTokenConfig, {"rounds": True}),
        (SuperTokenConfig, {"beyond": 1}),
        (LookupConfig, {"side": 33}),
        (GlobalQueryConfig, {"window": 33}),
        (GlobalQueryConfig, {"steps": 0}),
        (GlobalQueryConfig, {"pool": 1}),
        (SelfGuidedConfig, {"low": 0}),
        (SelfGuidedConfig, {"high": 1025}),
        (SelfGuidedConfig, {"middle": True}),
        (SelfGuidedConfig, {"cell": 33}),
        (SemanticTokenConfig, {"side": 0}),
        (AgentConfig, {"agent_ratio": 1.0}),
        (AgentConfig, {"merge_ratio": 0.4}),
        (AgentConfig, {"shortcut": float("inf")}),
        (AgentConfig, {"rows": 0}),
    ],
)
def test_bad_settings_raise_one_line(config: type, settings: dict) -> None:
    with pytest.raises(ValueError, match=f"{next(iter(settings))} is") as error:
        config(**settings)
    assert "\n" not in str(error.value)
