"""Prove the claims of secure_chat.pv, and see that each broken variant of it has the attack meant for it.

    python3 tests/model/run.py                 everything
    python3 tests/model/run.py WORD ...        only the models that have one of these words in their name
    python3 tests/model/run.py --write DIR     keep each model there, as ProVerif was given it

ProVerif 2.05 (https://proverif.inria.fr) is $PROVERIF, or `proverif` on the path.
Exit status: 0 everything is as expected; 1 something is not; 2 there is no ProVerif, or an edit of a variant
no longer applies to the model. That is checked first, and by tests/test_model.py too, without ProVerif.
"""

from __future__ import annotations

import argparse
import os
import re
import shutil
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from fnmatch import fnmatch
from pathlib import Path
from typing import NamedTuple

MODEL = Path(__file__).with_name("secure_chat.pv")
SECONDS = 900  # for one run of ProVerif
TRUE, FALSE = "true", "false"
FOUND = {"is true": TRUE, "is false": FALSE, "cannot be proved": "not proved"}
ROW = "{:46}  {:30}  {:8}  {:10}  {:>7}"

Edit = tuple[str, str]  # what stands in exactly one place of the model, and what takes its place


class Variant(NamedTuple):
    """The model with edits, the claims looked at (patterns of their names), and what is to be found of them.

    None: what the model itself says of each. FALSE: ProVerif must show a run of the variant, an attack, that
    contradicts the claim; that it cannot prove it is not enough.
    """

    name: str
    claims: tuple[str, ...]
    expected: str | None
    edits: tuple[Edit, ...]


def setting(name: str, *claims: str, edits: tuple[Edit, ...] = ()) -> Variant:
    """The protocol, against an attacker who can do what the edits add."""
    return Variant(name, claims, None, edits)


def broken(name: str, claim: str, *edits: Edit) -> Variant:
    """Take away what a claim rests on."""
    return Variant(name, (claim,), FALSE, edits)


def spare(name: str, claims: tuple[str, ...], *edits: Edit) -> Variant:
    """Take away what nothing rests on alone: something else stands behind it."""
    return Variant(name, claims, TRUE, edits)


def before(place: str, line: str) -> Edit:
    """Put one more line before another."""
    return f"  {place}", f"  {line}\n  {place}"


HISTORIES = (1, "EMPTY"), (2, "h1"), (3, "h2")  # a number, and the history before Alice's text of that number

# A shorter conversation than the model's: it saves most of the time.
N_1 = ("letfun goes_on(n: bitstring) = true.", "letfun goes_on(n: bitstring) = (n <> n2).")
N_2 = ("letfun goes_on(n: bitstring) = true.", "letfun goes_on(n: bitstring) = (n <> n3).")

# What else an attacker can do. (Not all of it at once, and not in every model: it takes too long.)

# AES-GCM as it is: who knows two keys can make a ciphertext that opens to a text of his own under each.
TWO_FACED = (
    (
        "fun decrypt(",
        "fun two_faced(bitstring, bitstring, bitstring, bitstring, bitstring): bitstring.\nfun decrypt(",
    ),
    (
        "decrypt(k, n, encrypt(k, n, m)) = m.",
        """decrypt(k, n, encrypt(k, n, m)) = m
  otherwise forall n: bitstring, k: bitstring, m: bitstring, k2: bitstring, m2: bitstring;
    decrypt(k, n, two_faced(n, k, m, k2, m2)) = m
  otherwise forall n: bitstring, k: bitstring, m: bitstring, k2: bitstring, m2: bitstring;
    decrypt(k2, n, two_faced(n, k, m, k2, m2)) = m2.""",
    ),
)
# Whoever keeps a transcript may publish Z as soon as he has it, and talk on.
Z_IS_SECRET = ("not p: bitstring; attacker(modexp(modexp(g(p), new x), new y)).\n", "")
PUBLISHED = (
    (
        "  event AliceDone(alice, pinned, th, Z);\n",
        "  event AliceDone(alice, pinned, th, Z);\n  (event Published(th); out(net, Z)) |\n",
    ),
    (
        "  out(net, (n0, c, sign(me, b0)));\n",
        "  out(net, (n0, c, sign(me, b0)));\n  (event Published(th); out(net, Z)) |\n",
    ),
    Z_IS_SECRET,
)
# The attacker chooses every text.
CHOSEN_TEXTS = (
    *(
        before(f"event AliceSays(alice, pinned, th, ({h}, m{n}));\n", f"in(net, m{n}: bitstring)[precise];")
        for n, h in HISTORIES
    ),
    *(
        before(f"let h{n} = (({h}, m{n}), r{n}) in\n  event BobSays", f"in(net, r{n}: bitstring)[precise];")
        for n, h in HISTORIES
    ),
)
# Public values whose exponent nobody has drawn: g, and the g^xy of others.
MORE_VALUES = (
    (
        "contains(p, modexp(g(p), x)) = true.",
        """contains(p, modexp(g(p), x)) = true
  otherwise forall p: bitstring, x: exponent, y: exponent; contains(p, modexp(modexp(g(p), x), y)) = true
  otherwise forall p: bitstring; contains(p, g(p)) = true.""",
    ),
)
# A half of the words is short: if she knows all else that goes into it, she finds an r, or a nonce for
# Alice's hello, with which it is the half that she wants. (One half: neither side compares both.)
TRIED = "".join(
    f"""fun {half}_hashed(bitstring): bitstring.
fun r_for_{half}(bitstring, bitstring): bitstring.
fun nonce_for_{half}(bitstring, bitstring, bitstring, bitstring, bitstring): bitstring.
fun {half}(bitstring): bitstring
  reduc forall th: bitstring, w: bitstring; {half}(sha256((words, th, r_for_{half}(th, w)))) = w
  otherwise forall b: bitstring, A: bitstring, alice: bitstring, r: bitstring, w: bitstring;
    {half}(sha256((words, sha256((b, (hello, nonce_for_{half}(b, A, alice, r, w), A, alice))), r))) = w
  otherwise forall h: bitstring; {half}(h) = {half}_hashed(h).
"""
    for half in ("bobs_half", "alices_half")
)
TRIES = (("fun bobs_half(bitstring): bitstring.\nfun alices_half(bitstring): bitstring.\n", TRIED),)

# What is taken away.

NO_RSA_KEYS_HASHED = (
    "sha256(((hello, p, nonce_b, B, bob), (hello, nonce_a, A, alice)))",
    "sha256(((hello, p, nonce_b, B), (hello, nonce_a, A)))",
)
NO_TH_SIGNED = ("sha256((signature, direction, th, C, n, c))", "sha256((signature, direction, C, n, c))")
NO_TH = (
    NO_TH_SIGNED,
    ("sha256((block1, Z, direction, th))", "sha256((block1, Z, direction))"),
    ("sha256((block2, Z, direction, th))", "sha256((block2, Z, direction))"),
)
NO_PIN_FOR_ALICE = ("  if is_pinned(bob, pinned) then\n", "")
NO_PIN_FOR_BOB = ("  if is_pinned(alice, pinned) then\n", "")
ALICE_TAKES_HER_OWN_KEY = ("  if is_not(bob, alice) then\n", "")
BOB_TAKES_HIS_OWN_KEY = ("  if is_not(alice, bob) then\n  if is_pinned", "  if is_pinned")
BOB_SIGNS_FIRST = (
    "  if is_valid(alice, a0, s) then\n"
    "  let (=EMPTY) = opened(Ka, n, READY, NOTHING, c) in\n"
    "  if plan = busy then",
    "  if plan = busy then",
)
NO_NONCES = (
    ("new nonce_a: bitstring;", "let nonce_a = NOTHING in"),
    ("new r: bitstring;", "let r = NOTHING in"),
)
R_UNCHECKED = ("  if fits(nonce_b, r) then\n  event AliceDone", "  event AliceDone")
NO_COMMITMENT_TO_R = (
    "letfun committed(r: bitstring) = sha256((commit, r)).",
    "letfun committed(r: bitstring) = r.",
)
NO_R_IN_WORDS = ("sha256((words, th, r))", "sha256((words, th))")
NO_TH_IN_WORDS = ("sha256((words, th, r))", "sha256((words, r))")
# One exponent for all sessions of a person
ONE_EXPONENT = (
    ("type exponent.", "type exponent.\nfun kept(rsa_key): exponent."),
    ("new x: exponent;", "let x = kept(me) in"),
    ("new y: exponent;", "let y = kept(me) in"),
    ("not attacker(new x).\nnot attacker(new y).\n", ""),
    Z_IS_SECRET,
)
# Exponents are written to a disk, from which a thief takes them together with the RSA key.
STORED_EXPONENTS = (
    ("type exponent.", "type exponent.\ntable disk(rsa_key, exponent)."),
    ("new x: exponent;", "new x: exponent; insert disk(me, x);"),
    ("new y: exponent;", "new y: exponent; insert disk(me, y);"),
    ("out(net, me))", "out(net, me); !get disk(=me, e) in out(net, e))"),
    ("not attacker(new x).\nnot attacker(new y).\n", ""),
    Z_IS_SECRET,
)
# A public value that would be refused: every power of it is itself, so that everybody knows Z.
VALUES_UNCHECKED = (
    ("fun contains(", "const small: bitstring.\nfun contains("),
    (
        "contains(p, modexp(g(p), x)) = true.",
        """contains(p, modexp(g(p), x)) = true
  otherwise forall p: bitstring; contains(p, small) = true.
fun shared(bitstring, exponent): bitstring
  reduc forall x: exponent; shared(small, x) = small
  otherwise forall Y: bitstring, x: exponent; shared(Y, x) = modexp(Y, x).""",
    ),
    ("let Z = modexp(B, x)", "let Z = shared(B, x)"),
    ("let Z = modexp(A, y)", "let Z = shared(A, y)"),
)
NO_Z = ("sha256((block1, Z, direction, th))", "sha256((block1, direction, th))")
NOT_VERIFIED = ("= verify(signer, d, s).", "= true.")
NO_IN_REPLY_TO = (
    ("encrypt(K, n, (record_type, in_reply_to, text))", "encrypt(K, n, (record_type, text))"),
    ("let (=record_type, =in_reply_to, text", "let (=record_type, text"),
)
NO_TYPE = ("let (=record_type, =in_reply_to, text", "let (_: bitstring, =in_reply_to, text")
BOB_LISTENS_AFTER_GOODBYE = (
    "  if plan = leave1 then bob_leaves(me, pinned, th, Cb, Kb, n1, a0, EMPTY) else\n",
    "  (if plan = leave1 then bob_leaves(me, pinned, th, Cb, Kb, n1, a0, EMPTY)) |\n",
)
A_REFUSAL_IS_A_READY = (
    "  let r = opened(Kb, n, READY, a0, c) in\n  if fits(nonce_b, r) then\n  event AliceDone",
    "  let (=EMPTY) = opened(Kb, n, CLOSE, a0, c) in let r = NOTHING in\n  event AliceDone",
)
A_REFUSAL_IS_EVIDENCE = (
    "  let r = opened(Kb, n, READY, a0, c) in\n  if fits(nonce_b, r) then\n  event JudgeReady",
    "  let (=EMPTY) = opened(Kb, n, CLOSE, a0, c) in\n  event JudgeReady",
)
REFUSAL_UNCHECKED = (
    "( let (=EMPTY) = opened(Kb, n, CLOSE, a0, c) in event AliceIsRefused(",
    "( let _: bitstring = opened(Kb, n, CLOSE, a0, c) in event AliceIsRefused(",
)
BOB_GOES_ON_AFTER_REFUSAL = (
    "    out(net, (n0, c, sign(me, signed(bob_to_alice, th, Cb, n0, c)))) ) else\n",
    "    out(net, (n0, c, sign(me, signed(bob_to_alice, th, Cb, n0, c)))) ) |\n",
)
NOBODY_READS = (
    ("    get voice(=friend, =bobs_half(h)) in event", "    event"),
    ("    get voice(=friend, =alices_half(h)) in event", "    event"),
)
ANYBODY_SPEAKS = (
    "  !judge | !reader |\n",
    "  !judge | !reader | !(in(net, (who: bitstring, half: bitstring)); insert voice(who, half)) |\n",
)
NO_COMMITMENT = ("sha256((signature, direction, th, C, n, c))", "sha256((signature, direction, th, n, c))")
NO_NUMBERS = (
    ("= (number = n).", "= true."),
    ("sha256((signature, direction, th, C, n, c))", "sha256((signature, direction, th, C, c))"),
)
NO_DIRECTION = (
    ("sha256((signature, direction, th, C, n, c))", "sha256((signature, th, C, n, c))"),
    ("sha256((block1, Z, direction, th))", "sha256((block1, Z, th))"),
    ("sha256((block2, Z, direction, th))", "sha256((block2, Z, th))"),
)

ALL_BUT_INJECTIVE = (
    "own-key-*",
    "misbinding",
    "shared-secret",
    "refusal-alone",
    "words-late-*",
    "commitment",
    "secrecy-*",
    "goodbye-*-*",
    "evidence-*",
    "one-text",
)
# Numbers tell whether somebody who left had answered first, or had been ready: without them, what is said of
# goodbyes and refusals is wrong.
WITHOUT_NUMBERS = (
    *(claim for claim in ALL_BUT_INJECTIVE if claim not in ("refusal-alone", "goodbye-*-*", "evidence-*")),
    "goodbye-*-unheard",
    "evidence-ready-*",
    "evidence-alice",
    "evidence-bob",
    "evidence-unheard-*",
    "evidence-one-*",
)
AGREEMENT = ("handshake-*", "refusal-*", "record-*", "goodbye-*")
WORDS = ("words-alice", "words-bob")

VARIANTS = [
    setting("the protocol", "*"),
    setting("... two-faced ciphertexts", "evidence-*", "one-text", edits=(N_1, *TWO_FACED)),
    setting("... published transcripts", *AGREEMENT, "secrecy-*", "evidence-*", edits=(N_1, *PUBLISHED)),
    setting(
        "... texts that the attacker chooses",
        "record-*",
        "goodbye-*",
        "evidence-*",
        edits=(N_1, *CHOSEN_TEXTS),
    ),
    setting(
        "... g and g^xy as public values",
        *ALL_BUT_INJECTIVE,
        "handshake-*",
        "refusal-*",
        *WORDS,
        edits=(N_1, *MORE_VALUES),
    ),
    setting("... a half of the words is tried", *WORDS, "commitment", "reach-words", edits=(N_1, *TRIES)),
    # ----------------------------------------------------------------------------- the handshake
    broken("no RSA keys in the transcript hash", "misbinding", N_1, NO_RSA_KEYS_HASHED),
    broken("no transcript hash in keys and signatures", "handshake-alice", N_1, *NO_TH),
    broken("Alice does not check the pin", "handshake-alice", N_1, NO_PIN_FOR_ALICE),
    broken("Bob does not check the pin", "handshake-bob", N_1, NO_PIN_FOR_BOB),
    broken("Alice takes her own key for Bob's", "own-key-alice", N_1, ALICE_TAKES_HER_OWN_KEY),
    broken("Bob takes his own key for Alice's", "own-key-bob", N_1, BOB_TAKES_HIS_OWN_KEY),
    broken("Bob signs READY before hers is verified", "handshake-bob", N_1, BOB_SIGNS_FIRST),
    broken("no nonces, and the same exponent every time", "handshake-bob", N_1, *NO_NONCES, *ONE_EXPONENT),
    broken("public values are not checked", "shared-secret", N_1, *VALUES_UNCHECKED),
    broken("exponents are stored", "secrecy-alice", N_1, *STORED_EXPONENTS),
    broken("exponents are stored", "secrecy-bob", N_1, *STORED_EXPONENTS),
    broken("no Z in the encryption key", "secrecy-alice", N_1, NO_Z),
    broken("no Z in the encryption key", "secrecy-bob", N_1, NO_Z),
    # ------------------------------------------------------------------------------- Bob is busy
    broken("Alice does not check the pin", "refusal-alice", N_1, NO_PIN_FOR_ALICE),
    broken("signatures are not verified", "refusal-alice", N_1, NOT_VERIFIED),
    broken("no transcript hash in keys and signatures", "refusal-alice", N_1, *NO_TH),
    broken("numbers are neither signed nor checked", "refusal-alice", N_1, *NO_NUMBERS),
    broken("numbers are neither signed nor checked", "refusal-alone", N_1, *NO_NUMBERS),
    broken("neither type nor body of a refusal is checked", "refusal-alice", N_1, NO_TYPE, REFUSAL_UNCHECKED),
    broken("Alice takes a refusal for a READY", "handshake-alice", N_1, A_REFUSAL_IS_A_READY),
    broken("Bob goes on after his refusal", "refusal-alone", N_1, BOB_GOES_ON_AFTER_REFUSAL),
    broken("Bob refuses before hers is verified", "refusal-bob", N_1, BOB_SIGNS_FIRST),
    broken("signatures are not verified", "evidence-ready-alice", N_1, NOT_VERIFIED),
    broken("the judge takes a refusal for a READY", "evidence-ready-bob", N_1, A_REFUSAL_IS_EVIDENCE),
    # ------------------------------------------------------------------------------------- words
    broken("the words are shown, and nobody reads", "words-alice", N_1, *NOBODY_READS),
    broken("the words are shown, and nobody reads", "words-bob", N_1, *NOBODY_READS),
    broken("the words are compared in a chat", "words-alice", N_1, ANYBODY_SPEAKS),
    broken("the words are compared in a chat", "words-bob", N_1, ANYBODY_SPEAKS),
    broken("no transcript hash in the words", "words-alice", N_1, NO_TH_IN_WORDS),
    broken("no transcript hash in the words", "words-bob", N_1, NO_TH_IN_WORDS),
    broken("Alice does not check r", "commitment", N_1, R_UNCHECKED),
    broken("Alice does not check r, and a half is tried", "words-alice", N_1, R_UNCHECKED, *TRIES),
    broken("Alice does not check r, and a half is tried", "words-bob", N_1, R_UNCHECKED, *TRIES),
    broken("nonce_B is r itself, and a half is tried", "words-alice", N_1, NO_COMMITMENT_TO_R, *TRIES),
    broken("nonce_B is r itself, and a half is tried", "words-bob", N_1, NO_COMMITMENT_TO_R, *TRIES),
    *(
        broken(name, claim, N_1, *edits)
        for claim in ("words-late-bobs", "words-late-alices")
        for name, edits in (
            ("nonce_B is r itself", (NO_COMMITMENT_TO_R,)),
            ("no r in the words", (NO_R_IN_WORDS,)),
            ("no nonces", NO_NONCES),
        )
    ),
    # ----------------------------------------------------------------------------------- records
    broken("signatures are not verified", "handshake-bob", N_1, NOT_VERIFIED),
    broken("signatures are not verified", "secrecy-alice", N_1, NOT_VERIFIED),
    broken("signatures are not verified", "record-alice", N_1, NOT_VERIFIED),
    broken("signatures are not verified", "evidence-alice", N_1, NOT_VERIFIED),
    broken("the type is not checked", "record-alice", N_1, NO_TYPE),
    broken("no in_reply_to: a request is replaced", "evidence-bob", N_1, *NO_IN_REPLY_TO),
    broken("no in_reply_to: a reply is replaced", "evidence-alice", N_2, *NO_IN_REPLY_TO),
    broken("no in_reply_to: a text that had not arrived", "goodbye-alice", N_1, *NO_IN_REPLY_TO),
    broken("no in_reply_to: a text that had not arrived", "evidence-goodbye-bob", N_1, *NO_IN_REPLY_TO),
    broken("Bob listens on after his goodbye", "goodbye-alice-unheard", N_1, BOB_LISTENS_AFTER_GOODBYE),
    broken("no C in signatures, two-faced ciphertexts", "one-text", N_1, NO_COMMITMENT, *TWO_FACED),
    broken("numbers are neither signed nor checked", "goodbye-alice-unsaid", N_2, *NO_NUMBERS),
    broken("numbers are neither signed nor checked", "evidence-goodbye-bob", N_2, *NO_NUMBERS),
    broken("numbers are neither signed nor checked", "evidence-goodbye-alice", N_1, *NO_NUMBERS),
    broken("no numbers, nor in_reply_to", "record-bob", N_2, *NO_NUMBERS, *NO_IN_REPLY_TO),
    broken("no direction in keys: nonces used twice", "secrecy-alice", N_1, *NO_DIRECTION),
    broken("no direction in keys: nonces used twice", "secrecy-bob", N_1, *NO_DIRECTION),
    broken(
        "no direction, nor in_reply_to; own keys taken",
        "handshake-alice",
        N_1,
        *NO_DIRECTION,
        *NO_IN_REPLY_TO,
        ALICE_TAKES_HER_OWN_KEY,
        BOB_TAKES_HIS_OWN_KEY,
    ),
    # ------------------------------------------------------- what is there twice: no attack without
    spare("numbers are neither signed nor checked", WITHOUT_NUMBERS, N_1, *NO_NUMBERS),
    spare("numbers are neither signed nor checked", ("record-*",), N_2, *NO_NUMBERS),
    spare("no transcript hash in signatures", (*ALL_BUT_INJECTIVE, "handshake-*"), N_1, NO_TH_SIGNED),
    spare(
        "no nonces", (*(c for c in ALL_BUT_INJECTIVE if c != "words-late-*"), "handshake-*"), N_1, *NO_NONCES
    ),
    spare("no C in signatures, two-faced ciphertexts", ("evidence-*",), N_1, NO_COMMITMENT, *TWO_FACED),
    spare("the type is not checked", ("refusal-*",), N_1, NO_TYPE),
    spare("no in_reply_to", ("refusal-*",), N_1, *NO_IN_REPLY_TO),
]


class Claim(NamedTuple):
    name: str
    expected: str
    formula: str


class Template(NamedTuple):
    """The model, taken apart at its query."""

    before: str
    variables: list[str]
    claims: list[Claim]
    after: str

    @classmethod
    def read(cls) -> Template:
        """A claim is a comment that begins with its [name] or [name: false], and a formula."""
        parts = re.fullmatch(
            r"(.*?)^query\n(.*?);\n(.*?)\.\n(\n\(\* -+ the protocol.*)",
            MODEL.read_text(encoding="utf-8"),
            re.DOTALL | re.MULTILINE,
        )
        if parts is None:
            raise ValueError(f"{MODEL}: the query is not where it should be")
        before, variables, query, after = parts.groups()
        claims = [
            Claim(name, FALSE if false else TRUE, formula)
            for name, false, formula in re.findall(
                r"^\(\* \[([a-z0-9-]+)(: false)?\].*?\*\)\n(.*?)(?:;\n|\Z)", query, re.DOTALL | re.MULTILINE
            )
        ]
        if len(claims) != query.count("==>"):
            raise ValueError(f"{MODEL}: a claim has no name")
        return cls(before, re.split(r",\s*", variables.strip()), claims, after)

    def model(self, edits: tuple[Edit, ...], claims: list[Claim]) -> str:
        """Return what ProVerif is given."""
        formulas = ";\n".join(claim.formula for claim in claims)
        used = [name for name in self.variables if re.search(rf"\b{name.split(':')[0]}\b", formulas)]
        text = f"{self.before}query {', '.join(used)};\n{formulas}.\n{self.after}"
        for old, new in edits:
            text = text.replace(old, new)
        return text

    def places(self, edits: tuple[Edit, ...]) -> Iterator[tuple[str, int]]:
        """For each edit in turn, yield what it replaces, and in how many places that stands."""
        text = self.before + self.after
        for old, new in edits:
            yield old, text.count(old)
            text = text.replace(old, new)


class Run(NamedTuple):
    """One run of ProVerif."""

    variant: Variant
    claims: list[Claim]
    model: str


def stale_edits() -> list[str]:
    """Return what is wrong: each edit of a variant must find its text in exactly one place of the model."""
    template = Template.read()
    return [
        f"{variant.name}: {places} places, not one, for {old!r}"
        for variant in VARIANTS
        for old, places in template.places(variant.edits)
        if places != 1
    ]


def plan() -> list[Run]:
    """Return the runs: one a variant, and one more for every claim of injective agreement: they are slow."""
    template, runs = Template.read(), []
    for variant in VARIANTS:
        claims = [
            claim for claim in template.claims if any(fnmatch(claim.name, name) for name in variant.claims)
        ]
        groups = [[claim] for claim in claims if "inj-event" in claim.formula]
        groups.insert(0, [claim for claim in claims if "inj-event" not in claim.formula])
        runs += [Run(variant, group, template.model(variant.edits, group)) for group in groups if group]
        if not claims or (variant.expected and {claim.expected for claim in claims} != {TRUE}):
            raise ValueError(f"{variant.name}: not the claims that it should be about")
    return runs


def prove(command: str, file: Path, run: Run) -> tuple[list[str], float]:
    """Return what ProVerif found of each claim, and how many seconds that took."""
    file.write_text(run.model, encoding="utf-8")
    environment = {"OCAMLRUNPARAM": "s=4M,o=300", **os.environ}  # collect garbage less often
    begun = time.monotonic()
    try:
        done = subprocess.run(
            [command, file], capture_output=True, text=True, timeout=SECONDS, env=environment
        )
    except subprocess.TimeoutExpired:
        return ["no end"] * len(run.claims), SECONDS
    results = re.findall(r"^RESULT [^(].*(is true|is false|cannot be proved)", done.stdout, re.MULTILINE)
    if len(results) != len(run.claims):
        raise ValueError(f"{run.variant.name}: ProVerif said\n{done.stdout[-2000:]}{done.stderr}")
    return [FOUND[result] for result in results], time.monotonic() - begun


def main() -> int:
    parser = argparse.ArgumentParser(description="Check secure_chat.pv and its broken variants.")
    parser.add_argument(
        "words", nargs="*", metavar="WORD", help="only models with one of these in their name"
    )
    parser.add_argument("--write", type=Path, metavar="DIR", help="keep what ProVerif was given here")
    options = parser.parse_args()
    wrong = stale_edits()
    if wrong:
        print("\n".join(wrong), file=sys.stderr)
        return 2
    command = shutil.which(os.environ.get("PROVERIF", "proverif"))
    if command is None:
        print(
            "There is no ProVerif: put `proverif` on the path, or its place into $PROVERIF.", file=sys.stderr
        )
        return 2
    runs = [r for r in plan() if not options.words or any(word in r.variant.name for word in options.words)]
    begun, total, differing = time.monotonic(), 0, 0
    print(ROW.format("model", "claim", "expected", "found", "seconds"), flush=True)
    with tempfile.TemporaryDirectory() as temporary, ThreadPoolExecutor(os.cpu_count()) as pool:
        folder = options.write or Path(temporary)
        folder.mkdir(parents=True, exist_ok=True)
        files = [
            folder / f"{number:02} {re.sub('[^A-Za-z0-9]+', ' ', run.variant.name).strip()}.pv"
            for number, run in enumerate(runs, 1)
        ]
        for run, (found, seconds) in zip(runs, pool.map(prove, [command] * len(runs), files, runs)):
            expected = [run.variant.expected or claim.expected for claim in run.claims]
            rows = list(zip((claim.name for claim in run.claims), expected, found))
            total += len(rows)
            differing += sum(wanted != got for _, wanted, got in rows)
            if expected == found and len(rows) > 2 and run.variant is not VARIANTS[0]:
                rows = [(f"{len(rows)} claims", run.variant.expected or "as above", found[0])]
            took = f"{seconds:.1f}"
            for name, wanted, got in rows:
                row = ROW.format(run.variant.name, name, wanted, got, took)
                print(
                    row.rstrip() if wanted in (got, "as above") else f"{row:111}  <-- not as expected",
                    flush=True,
                )
                took = ""
    cpu = os.times()
    print(
        f"{total - differing} of {total} as expected, in {time.monotonic() - begun:.0f} s"
        f" ({cpu.children_user + cpu.children_system:.0f} s of processor time)"
    )
    return 1 if differing else 0


if __name__ == "__main__":
    sys.exit(main())
