"""Every codec of the folder gives back what it was given; the entropy codec is small and exact."""

import base64
import dataclasses
from math import erf, sqrt

import numpy as np
import pytest
from artifact_toy import gaussian_codes, layout
from hypothesis import given, settings
from hypothesis import strategies as st

from epigram import plugin
from epigram.artifact.codecs import _spread, _tables, brotli, entropy
from epigram.artifact.codecs.base import order0_bits, share_bits, tensor_class
from epigram.errors import ArtifactError

CODECS = "epigram.artifact.codecs"
Classes = list[list[tuple[str, np.ndarray, int]]]


def round_trip(codec: str, classes: Classes) -> list[bytes]:
    """Encode and decode class by class, compare, and return the stored bytes."""
    module = plugin.load(CODECS, codec)
    encoder, decoder = module.new_encoder(), module.new_decoder()
    stored = []
    for group in classes:
        matrices = [(layout(name, codes, qmax), codes) for name, codes, qmax in group]
        encoded = encoder.encode(matrices)
        decoded = decoder.decode(encoded.stored, [found for found, _ in matrices])
        for (found, codes), result in zip(matrices, decoded, strict=True):
            assert result.dtype == np.int8
            assert np.array_equal(result, codes), found.name
        assert len(encoded.matrix_bits) == len(group)
        stored.append(encoded.stored)
    return stored


@st.composite
def matrices(draw: st.DrawFn) -> tuple[str, np.ndarray, int]:
    rows, cols = draw(st.integers(0, 40)), draw(st.integers(0, 40))
    qmax = draw(st.sampled_from([1, 3, 7, 15, 31, 63, 127]))
    random = np.random.default_rng(draw(st.integers(0, 2**32)))
    kind = draw(st.sampled_from(["gauss", "uniform", "zero", "constant", "extreme", "sparse", "rows"]))
    codes = {
        "gauss": lambda: random.standard_normal((rows, cols)) * draw(st.floats(0.01, 200.0)),
        "uniform": lambda: random.integers(-qmax, qmax + 1, (rows, cols)),
        "zero": lambda: np.zeros((rows, cols)),
        "constant": lambda: np.full((rows, cols), random.integers(-qmax, qmax + 1)),
        "extreme": lambda: random.choice([-qmax, qmax], (rows, cols)),
        "sparse": lambda: (random.random((rows, cols)) < 0.01) * qmax,
        "rows": lambda: random.integers(-qmax, qmax + 1, (rows, 1)) * np.ones((1, cols)),
    }[kind]()
    return f"layers.{draw(st.integers(0, 2))}.x", np.clip(np.rint(codes), -qmax, qmax).astype(np.int8), qmax


@pytest.mark.parametrize("codec", plugin.names(CODECS))
@settings(max_examples=60, deadline=None)
@given(classes=st.lists(st.lists(matrices(), max_size=3), max_size=3))
def test_round_trip(codec: str, classes: Classes) -> None:
    round_trip(codec, classes)


@pytest.mark.parametrize("codec", plugin.names(CODECS))
@settings(max_examples=60, deadline=None)
@given(data=st.binary(max_size=200), item_bytes=st.sampled_from([1, 2, 4]))
def test_bytes_round_trip(codec: str, data: bytes, item_bytes: int) -> None:
    module = plugin.load(CODECS, plugin.load(CODECS, codec).BYTES)
    stored = module.pack(data, item_bytes)
    result = module.unpack(stored, len(data), item_bytes)
    assert result.tobytes() == data
    assert result.flags.writeable
    for wrong in (len(data) + 1, len(data) - 1):
        if wrong >= 0:
            with pytest.raises(ArtifactError):
                module.unpack(stored, wrong, item_bytes)


@pytest.mark.parametrize("shape", [(1, 1), (1, 5000), (5000, 1), (3, 9000), (700, 3), (2, 140_000), (70_000, 1)])
def test_odd_shapes(shape: tuple[int, int]) -> None:
    codes = gaussian_codes(*shape, seed=3)
    round_trip("entropy", [[("layers.0.x", codes, 31)], [("embed", codes, 127)]])


def test_scales_of_any_value_are_no_obstacle() -> None:
    codes = gaussian_codes(6, 40)
    scale = np.array([0.0, -1.0, np.nan, np.inf, 6e-8, 65504], np.float16)
    matrix = layout("a.0", codes, 31, scale)
    again = layout("a.1", codes, 31, scale)
    encoded = entropy.new_encoder().encode([(matrix, codes), (again, codes)])
    for result in entropy.new_decoder().decode(encoded.stored, [matrix, again]):
        assert np.array_equal(result, codes)


def trained_like(layers: int, dim: int) -> Classes:
    """Matrices with what trained ones have: neurons that differ in strength, the same in up and down;
    residual channels that differ a little, alike in all layers."""
    random = np.random.default_rng(1)
    channel = np.exp(random.normal(0, 0.15, dim))
    up, down, query = [], [], []
    for i in range(layers):
        neuron = np.exp(random.normal(0, 0.6, 3 * dim))
        for group, name, row, col in (
            (query, "q", np.ones(dim), channel), (up, "up", neuron, channel), (down, "down", channel, neuron),
        ):  # fmt: skip
            weights = random.standard_normal((len(row), len(col))) * row[:, None] * col * 4.0
            group.append((f"layers.{i}.{name}", np.clip(np.rint(weights), -31, 31).astype(np.int8), 31))
    return [query, up, down]


def test_entropy_codec_beats_brotli_by_more_than_three_percent() -> None:
    classes = trained_like(layers=3, dim=128)
    num = sum(codes.size for group in classes for _, codes, _ in group)
    sizes = {codec: 8 * sum(map(len, round_trip(codec, classes))) / num for codec in ("entropy", "brotli")}
    assert sizes["entropy"] < 0.97 * sizes["brotli"]
    order0 = sum(order0_bits(codes) for group in classes for _, codes, _ in group) / num
    assert sizes["entropy"] < 0.97 * order0


def test_entropy_codec_comes_close_to_what_the_source_needs() -> None:
    """Codes drawn from known Gaussians: their entropy given all spreads, in closed form by the sum over
    codes."""
    rows, cols, sigma = 240, 200, 4.4
    codes = gaussian_codes(rows, cols, sigma=sigma, spread=0.25, seed=9)
    random = np.random.default_rng(9)
    row, col = (np.exp(random.normal(0, 0.25, n)) for n in (rows, cols))
    deviations = row[:, None] * col * sigma
    phi = np.vectorize(lambda x: 0.5 * (1 + erf(x / np.sqrt(2))))
    low, high = (codes - 0.5) / deviations, (codes + 0.5) / deviations
    mass = np.where(codes == 31, 1 - phi(low), np.where(codes == -31, phi(high), phi(high) - phi(low)))
    ideal_bits = -np.log2(mass).sum()
    (stored,) = round_trip("entropy", [[("w", codes, 31)]])
    # 440 spreads are unknown to the coder; learning one costs about half the logarithm of the codes it governs
    learning_bits = 0.5 * (rows * np.log2(cols) + cols * np.log2(rows))
    assert ideal_bits < 8 * len(stored) < ideal_bits + 1.5 * learning_bits


def test_stored_bytes_are_the_entropy_of_the_codecs_own_model() -> None:
    encoder = entropy.new_encoder()
    for group in trained_like(layers=2, dim=96):
        encoded = encoder.encode([(layout(name, codes, qmax), codes) for name, codes, qmax in group])
        assert encoded.model_bits is not None
        assert encoded.model_bits <= 8 * len(encoded.stored) < 1.001 * encoded.model_bits + 64
        assert sum(encoded.matrix_bits) == pytest.approx(encoded.model_bits)


def test_columns_of_down_are_predicted_by_rows_of_up() -> None:
    query, up, down = trained_like(layers=1, dim=128)
    alone, after = round_trip("entropy", [down])[0], round_trip("entropy", [query, up, down])[2]
    assert len(after) < len(alone) - 100


def test_sparse_sections_are_padded_so_that_a_small_file_makes_little_work() -> None:
    codes = np.zeros((1200, 1200), np.int8)
    codes[:, 0] = 1
    (stored,) = round_trip("entropy", [[("w", codes, 31)]])
    assert codes.size / len(stored) <= entropy.MAX_CODES_PER_BYTE
    with pytest.raises(ArtifactError, match="too short"):
        entropy.new_decoder().decode(stored[:1000], [layout("w", codes, 31)])


# Streams of fixed matrices. Decoding may only change together with the format's version: files in the field hold such
# streams, and a machine that computes one other table cannot read them.
GOLDEN_STREAMS = (
    "{{R65ofrTS4+QHF8&V2@O|JG22sar&&0v=TMx}GVE?`-<oq*F|f&9f}kcixT|C$ILlJw@qJg~PSJTeqPuX5E;)5?rnlHvpruL5@I"
    "`o@mbp<M`)nx;G3NpBSr4W6Sc6!>5dPww*L>e{i?BBYyk`+ab|_Ow`JD3!RB+VMu>MOI?!lrv9#!R5RzHkY{gzai;h8dzu58x~sf"
    "WKQr*OnwAzl~O_a$7uoq3EsVOT3H|)AiF!a%`G_uP$mKz5T_Kr%!0m3T51X)*W7nel*eDAAEHh`e+4gP+e`MXZ;ts-Ijmm5cysW8"
    "!n<TfP%Ss877ncBXCi6dRT_~9Q=OnR<sgNx?fPg9oGZKKv3QUO<8Jx5UFll0PJ#5?mjGfIs^PUq=$Ys}V61GS>&yQ}NEaVYx>d6V"
    "0zC9Gs|+fci{X)l_9N>pdfa(`Yn8TNd_O_3Bsq!AI`;;Z3#0gn_ieK+?wtv)86q$;yjf62^+$*6-b_z%iq*22@%E;(II)=)7REr;"
    "ND`zit$*pj5OiDDW|=+_0YJ_t=vPEBM?sIx1#jW|PD<K77FLMtHH#%r#3_+16t~x5f+vx#L{KY^GL_;?{#;-M^R?PdsYs2vE@rF)"
    "r3;)seqLGNHN8Z<+E{_E@t63)0XJQp4VkRBg3uj9NGpLjh*{nMGBwV{zqT4Pxr_3}y8q`Xdczwomt$M>;z5iCle?r)P;trT5(Kvc"
    "rt>Q#W!WwK3m|>LZyAxO{5S}W8*e6tjK1Z~V2?YF>v~y;8zLmMM~+*L&#GY)9Y&aI6HT<s7r6^;u&hZ45z+|dnwX!TEo;BQP;Vu@"
    "AT}`}ck9dn`Xw-Q2OvuF5dNKFDpKvy*2Hwu?Ux+1Za`uE2wq)jxHy;I?VO-Yp^-8?0g?MQ0f!&c1D$SQqe2{V*(A=hs-5;Lvi%IC"
    "zFLFf-M&fJ%{ArU=&D(MWxWf-r<!O5`1Vc%E^dNoSV36kN?1w39P^VB)WJinU>I5!Z|flp0O%SzPA@R7I>{}VS!j#`6}$u~>C!OW"
    "@KMp_zdK*lLs^0eikmJx8B@Nkim;dbLH4B|*hXT>T{iR^a8%0gCgevH2NI-Y-iJ4|6JQ=4Jx-!_UC-K)qM`(4l17v}(Vnq~ZZd}m"
    "@$p%K*N>$R_VF}<eFk>S%)+e)rHTAEVf^-DcOX22Q>lsJ7{9xKS`ZM$Aur$>i(xHm+E9<Siw_re=RGSq&f?2U+Ce(6wtf4@O;7cb"
    "Scx9+9$B^W9dq~oBfy@qImP%&Y{J;xdfHwSE|_#!rQ#%&zDfL4P;IPQQWxJ8K?7>)aC4x=NNHy#W$g7VoXY?DF*(%j4H4i87GaPp"
    "62AZ?JogXLVkC!|#`Vy<!8)!NcX1G)ScjFNIh{IOIArh4Es<LYHB9Tsr07^U(EsuMDczd>LtB7)A1|3zq#9b^e!kVo^8plRhva<V"
    "4ogcus#gTz9tKQj`#q=8D_cK8W!srUOtaUU>yK1xlbyIqZCKUK#H7Dy-^8b;i1KZ=44LpCjkKp=9!N>WLtU--rpIKo4=%yhBb~2D"
    "uc-BHbdvMd;GNw_6|}Dus_~jlYHxx&X?p-MKnp6tIJ5b9a!rh8GO3MMOK7*$5?FCAPwZ2uhSC4>c^Gk@PNpe3_aTi_c(JBA%;~Ub"
    "w&p-dITOOah-XFtdwkU;d@pHdE-a6Bo2t|?d;99F>BbTY%rTa7V%t17612p4Bepw0#d`kJ4+5@sMR-6y6N0(6Z-ZuARVoCORfg0;"
    "*-|?kP|Mdn^g6=Ud1Xxhj5s_OwTcwNyd*VF6ghwhInp+}>o%3XVymWvC%wV1RovG3w4U=kGi~!E0{3Ctz?xHy_0}&Rg+3P6=#+!U",
    "{{RmJofy(A-@W|}4IEfDOAqI`C}e=VpOzRqo8HtEIz+!+Z4yM1?Qj23Mg4G3Sb?ff<$dO!*-vGv3lx7gNyYO}Ym&)KOSpN>nDeZG"
    "xp`!42&Xj4`?j#EP8+qY8o;k&s;U2a$kd;sbqVy7G(X{g$kD{ae6XLA17wz@(H;kzuVK4YQar(Lq`)+>IIf32*C47&_ajfV=p=3d"
    "w%;(5ZJPW7WOl!~ZJxg~;))bbFkt(D9tJHL*u?C-TMKu!^<rj)RvIfYTOymO4PI9hBs#GBE}2tLd1^mg(yP0pw8B%Y?mRGgatLdG"
    "R!s1Yuzfy1u2#Y|&yJ4mr5BLL|J50=(}o{|AVwkly)=amu+dF%P_f{Gcm9sOWU3V5U$9;Uk<(e)FGGTNhMtwg$nx`H!we2@@INEf"
    "i5}1Pc&Fg-6ZF$@+D^Ky)Sjjif5Vl61(3n6_I$IMpk>Ml6m3rOCxJJkQ~&iwu@-U$XVEBY_X2sNhlLu3W3R2Zp3v@%0lW0fd<Win"
    "Kfw07i4q0I?_+QDYEI#-AUb{7V=n3x5{+nZf6;gQKkiEI;{8*^)>~VO^%Fy93=7nR7+ob+M+9f{S7r|-PmX!jdk=?C{%VZoRdLKp"
    "D$RSTo7Pf!F8#Pxg-%qg3h);AnYsdz*^8f+61pRV0_u-c-W7A<J3NQ+zdK3)HhmP(tUd|Qo$$fM&iAMCsWli?A`U-W$uTH@w%*Gw"
    "%e+T1uuO4UMFDt2C)HCe05hi_a-c%{x>AymIiR)Hw^^I{LU%XYT5DA52WjlYJQlEg!fB?nty(tp_2sWe{`@=sSIZ0n&ZwIbQXP77"
    "VVHnW*1_`5#Z>?s)x(hl&?MC6AS$;EzS65fu5s}I>#pMloS-vRc$ds(-bl^jbNjSdLK3%<k>B_-NSlmT^`2wrOr7fb@CDc0KXdkJ"
    "y<{UBy=YnqY!OoJ$i5j2gRn53deiuGDY}{38w)VnKnC76I`X6m&ZV%9_~SQLP}u()#+X09Mu%iUODZ%eppYvgoPTPy{*it<ryc",
)


def golden_classes() -> Classes:
    index = np.arange(30)[:, None] * 37 + np.arange(40) * 101
    codes = ((index * index % 63 - 31) // (1 + np.arange(40) % 4)).astype(np.int8)
    return [[("a.0", codes, 31), ("a.1", codes // 2, 31)], [("b", codes.T.copy(), 127)]]


def test_streams_decode_alike_on_every_machine() -> None:
    decoder = entropy.new_decoder()
    for stream, group in zip(GOLDEN_STREAMS, golden_classes(), strict=True):
        stored = base64.b85decode(stream)
        results = decoder.decode(stored, [layout(name, codes, qmax) for name, codes, qmax in group])
        for result, (_, codes, _) in zip(results, group, strict=True):
            assert np.array_equal(result, codes)


def test_tables_match_the_error_function() -> None:
    table = _tables.gaussian_tables(31)
    for level in range(90, 150, 7):
        mantissa = 1 + (level % 8 + 0.5) / 8
        deviation = sqrt(mantissa * 2.0 ** (level // 8 - 12) - 1 / 12)
        edges = [0.5 * (1 + erf((k + 0.5) / deviation / sqrt(2))) for k in range(-32, 32)]
        edges[0], edges[-1] = 0.0, 1.0
        assert table[level] / _tables.TABLE_TOTAL == pytest.approx(np.diff(edges), abs=2e-5)
    assert (table >= 1).all()


def test_fixed_point_logarithms() -> None:
    values = np.exp(np.random.default_rng(0).normal(0, 10, 5000))
    assert np.abs(_tables.log2(values) - _tables.LOG_ONE * np.log2(values)).max() < 1.5
    logs = np.arange(-20000, 20000, 7)
    assert _tables.exp2(logs) == pytest.approx(2.0 ** (logs / _tables.LOG_ONE), rel=1e-12)


@pytest.mark.parametrize(("field", "value"), [("strength", 16), ("stride", 0), ("stride", 9), ("source", 0)], ids=str)
def test_impossible_descriptions_are_refused(field: str, value: int) -> None:
    codes = gaussian_codes(8, 8)
    encoded = entropy.new_encoder().encode([(layout("w", codes, 31), codes)])
    sent = dataclasses.replace(_spread.Description.unpack(encoded.stored, 0), **{field: value})
    stored = sent.pack() + encoded.stored[_spread.Description.BYTES :]
    with pytest.raises(ArtifactError, match="entropy section"):
        entropy.new_decoder().decode(stored, [layout("w", codes, 31)])


def test_half_a_word_is_refused() -> None:
    codes = gaussian_codes(8, 8)
    encoded = entropy.new_encoder().encode([(layout("w", codes, 31), codes)])
    with pytest.raises(ArtifactError, match="words"):
        entropy.new_decoder().decode(encoded.stored + b"x", [layout("w", codes, 31)])


def test_brotli_stops_at_the_declared_length() -> None:
    bomb = brotli.pack(bytes(5_000_000), 1)
    assert len(bomb) < 1000
    with pytest.raises(ArtifactError, match="declares"):
        brotli.unpack(bomb, 1000, 1)
    for cut in range(len(bomb)):
        with pytest.raises(ArtifactError):
            brotli.unpack(bomb[:cut], 5_000_000, 1)


def test_a_grid_of_scales_becomes_a_palette() -> None:
    random = np.random.default_rng(0)
    scales = (2.0 ** (random.integers(-40, 40, 4000) / 8)).astype(np.float16).tobytes()
    shuffled = brotli._compress(brotli.shuffle(scales, 2))
    assert len(brotli.pack(scales, 2)) < 0.8 * len(shuffled)


def test_order0_bits_is_the_entropy() -> None:
    codes = np.array([[0, 0, 1, -1]], np.int8)
    assert order0_bits(codes) == pytest.approx(4 * 1.5)
    assert order0_bits(np.zeros((0, 3), np.int8)) == 0.0
    assert sum(share_bits(100, [(layout("a", codes, 1), codes)] * 3)) == pytest.approx(800)


def test_all_layers_share_a_class() -> None:
    assert tensor_class("layers.11.up") == tensor_class("layers.2.up") == "layers.#.up"
    assert tensor_class("bigram.embed") == "bigram.embed"
