"""The checks of the programs, each with a patch that takes it away, and the test that must notice.

A security test that stays green without the thing it tests is worse than none: usually another check has
refused first. test_weakenings.py applies each patch to a copy of the programs, and the one test meant for it
must go red. Mallory (mallory.py, --without) shows with the same patches what the checks are there for.

Most patches are statements at the end of a file: they put another function in the place of one, and do not
depend on how that one is written. What stands in the middle of a function is changed in the text, and such a
change must fit exactly once.
"""

from __future__ import annotations

import shutil
import tempfile
import textwrap
from pathlib import Path
from typing import NamedTuple

UTILS, BOB, ALICE = PROGRAMS = ("crypto_utils.py", "bob_server.py", "alice_client.py")
START = '\n\nif __name__ == "__main__":\n    main()\n'  # how a script ends


class Weakening(NamedTuple):
    """What is taken away, the test that must notice, and the patch: statements, or changes of the text."""

    name: str
    test: str
    statements: str = ""
    edits: tuple[tuple[str, str], ...] = ()
    file: str = UTILS


def weaken(folder: Path, weakening: Weakening) -> None:
    """Apply one weakening to the programs in a folder. Raises ValueError where it does not fit."""
    path = folder / weakening.file
    text = path.read_text(encoding="utf-8")
    for old, new in weakening.edits:
        if text.count(old) != 1:
            raise ValueError(f"{weakening.name} changes what occurs {text.count(old)} times: {old}")
        text = text.replace(old, new)
    if weakening.statements:
        statements = textwrap.dedent(weakening.statements).strip()
        added = f"\n\n# Weakened: {weakening.name}.\n{statements}\n"
        if weakening.file == UTILS:
            text += added
        elif text.count(START) == 1:
            text = text.replace(START, added + START)
        else:
            raise ValueError(f"{weakening.file} does not end as expected")
    path.write_text(text, encoding="utf-8")


def broken_copy(programs: Path, names: tuple[str, ...]) -> Path:
    """Copy the programs to a new folder, without these checks. The copy says that it is broken."""
    folder = Path(tempfile.mkdtemp(prefix="mallory-"))
    for name in PROGRAMS:
        shutil.copy(programs / name, folder)
    try:
        for name in names:
            weaken(folder, WEAKENINGS[name])
    except ValueError:
        shutil.rmtree(folder)
        raise
    with (folder / UTILS).open("a", encoding="utf-8") as file:
        file.write(
            "\n\n# A home folder of its own, and a first line on the screen.\n"
            f"os.environ['SECURE_CHAT_HOME'] = {str(folder / 'home')!r}\n"
            "def run_program(parser, run, original=run_program):\n"
            f"    print('A broken copy, for a lesson. It does not check: {', '.join(names)}.', "
            "file=sys.stderr, flush=True)\n"
            "    original(parser, run)\n"
        )
    return folder


def unchecked(name: str, test: str, reason: str) -> Weakening:
    """Never refuse for a reason that begins like this (a regular expression)."""
    return Weakening(
        name,
        test,
        f"""
        def require(condition, reason, require=require):
            require(condition or re.match({reason!r}, reason), reason)
        """,
    )


def edited(name: str, test: str, *edits: tuple[str, str], file: str = UTILS) -> Weakening:
    return Weakening(name, test, edits=edits, file=file)


def signed(name: str, test: str, what: str) -> Weakening:
    """Sign this before nonce, ciphertext and tag."""
    return Weakening(
        name,
        test,
        f"""
        def initialize(self, sender, signer, z, th, original=Direction.__init__):
            original(self, sender, signer, z, th)
            label, C = sender.label, derive_keys(z, sender.label, th)[1]
            self._context = VERSION + b" signature " + {what}
        Direction.__init__ = initialize
        """,
    )


def keys_from(name: str, test: str, arguments: str) -> Weakening:
    """Derive the keys from other values than z, direction and th."""
    return Weakening(
        name,
        test,
        f"""
        def derive_keys(z, direction, th, original=derive_keys):
            return original({arguments})
        """,
    )


def hashed(name: str, test: str, what: str) -> Weakening:
    """Let th be the hash of something else than both frames."""
    return Weakening(
        name,
        test,
        f"""
        def settle(bob, alice, original=settle):
            keys, _ = original(bob, alice)
            bob, alice = bob.encode(), alice.encode()
            return keys, SHA256.new({what}).digest()
        """,
    )


def after_success(name: str, test: str, method: str, statement: str) -> Weakening:
    """Change a direction after each record that succeeded."""
    return Weakening(
        name,
        test,
        f"""
        def succeed(self, *arguments, original={method}):
            result = original(self, *arguments)
            {statement}
            return result
        {method} = succeed
        """,
    )


def after_failure(name: str, test: str, statement: str) -> Weakening:
    """Change a direction after each record that was refused."""
    return Weakening(
        name,
        test,
        f"""
        def open_record(self, record, other, keep=lambda _: None, original=Opener.open):
            try:
                return original(self, record, other, keep)
            except ProtocolError:
                {statement}
                raise
        Opener.open = open_record
        """,
    )


def hash_of(name: str, test: str, parts: str) -> Weakening:
    """Sign other parts of a record than nonce, ciphertext and tag."""
    return Weakening(
        name,
        test,
        f"""
        def hash_parts(self, encrypted, original=Direction._hash):
            nonce, ciphertext, tag = encrypted[:12], encrypted[12:-16], encrypted[-16:]
            return original(self, b"".join(({parts},)))
        Direction._hash = hash_parts
        """,
    )


def drawn(name: str, test: str, nonce: str) -> Weakening:
    """Draw another nonce for a hello; Bob's r, which his nonce commits to."""
    return edited(name, test, ("drawn = secrets.token_bytes(NONCE_BYTES)", f"drawn = {nonce}"))


def exponent(name: str, test: str, drawn: str, statements: str = "") -> Weakening:
    """Draw another private exponent."""
    usual = "exponent = secrets.token_bytes(len(to_bytes(group.p)) // 8)"
    return Weakening(name, test, statements, ((usual, f"exponent = {drawn}"),))


ATTACKS, HANDSHAKE, RECORDS = "test_attacks.py::test_", "test_handshake.py::test_", "test_records.py::test_"
PRIMITIVES, VECTORS, DISK = "test_primitives.py::test_", "test_vectors.py::test_", "test_disk.py::test_"
TRANSCRIPT = "test_transcript.py::test_"
SERVER, TRUST, TALK = "test_server.py::test_", "test_trust.py::test_", "test_conversation.py::test_"
SESSION = VECTORS + "crypto_utils_makes_the_same_and_opens_it_on_both_sides"
FRESH = HANDSHAKE + "every_session_has_fresh_values"
SEEDED = HANDSHAKE + "no_secret_comes_from_a_generator_that_can_be_seeded"
ONE_NONCE = RECORDS + "no_nonce_meets_a_key_twice"
ON_THE_WIRE = RECORDS + "nothing_on_the_wire_depends_on_the_text_but_its_length_class"
OTHER_DIRECTION = RECORDS + "a_record_of_the_other_direction_is_refused_even_if_all_keys_were_the_same"
MISBINDING = HANDSHAKE + "misbinding_bob_does_not_take_alices_words_for_mallorys"
FORGED = RECORDS + "a_forged_record_is_refused_and_so_is_all_that_follows"
SIGNED = HANDSHAKE + (
    "nothing_is_signed_before_the_other_key_is_acceptable_and_by_bob_before_alice_has_proven_hers"
)
UNFIT = HANDSHAKE + "an_unfit_text_is_refused_at_home_and_the_chat_goes_on"
REFUSED = VECTORS + "crypto_utils_refuses_the_transcript_for_that_reason"
REFUSED_HELLO = VECTORS + "crypto_utils_refuses_the_hello_for_that_reason"
REFUSED_RECORD = VECTORS + "crypto_utils_refuses_the_record_for_that_reason"
MESSAGES = "test_messages.py::test_what_goes_wrong_is_told_in_one_way"


def pinning(name: str, test: str, statement: str) -> Weakening:
    """Pin a key after this statement, which may change the lines that were there."""
    return Weakening(
        name,
        test,
        f"""
        def pin(self, key):
            pins = self.pins()
            {statement}
            lines = [pin.line for pin in pins] + [f"{{self.name}} {{ssh_line(key)}}\\n".encode()]
            self.store.write(KeyStore.KNOWN_PEERS, lambda: b"".join(lines))
        PinnedPeer.pin = pin
        """,
    )


LIST = [
    # ----------------------------------------- parameters and public values
    unchecked("size-of-p", ATTACKS + "parameters[p of 2047 bits]", "p has .* bits"),
    unchecked("length of p", ATTACKS + "parameters[p of 4097 bits]", "p or g is over 4096"),
    unchecked("p padded", ATTACKS + "parameters[p padded]", "p or g is not in its minimal"),
    unchecked("p even", ATTACKS + "parameters[p even]", "p is even"),
    unchecked("safe-prime", ATTACKS + "parameters[p composite]", "p is not a safe prime"),
    Weakening(
        "q not tested",
        ATTACKS + "parameters[p prime, q composite]",
        "def miller_rabin_test(candidate, rounds): return 1",
    ),
    Weakening(
        "p not tested",
        PRIMITIVES + "is_safe_prime_refuses[q prime, no factor 3 in p]",
        """
        def is_safe_prime(p, rounds=64):
            return p % 3 != 0 and bool(miller_rabin_test((p - 1) // 2, rounds))
        """,
    ),
    Weakening(
        "one round for a p that somebody else chose",
        PRIMITIVES + "a_prime_is_tested_as_many_times_as_it_is_trusted[64]",
        """
        def is_safe_prime(p, rounds=64, original=is_safe_prime):
            return original(p, min(rounds, 1))
        """,
    ),
    Weakening(
        "any p taken once another one was tested",
        ATTACKS + "parameters[p composite]",
        """
        def check_peers_group(self, group):
            if self.read(self.GROUP) is None:
                check_group(group)
            return group
        KeyStore.accept_group = check_peers_group
        """,
    ),
    Weakening(
        "a group that failed is remembered",
        HANDSHAKE + "a_group_that_failed_is_not_remembered",
        """
        def check_peers_group(self, group, original=KeyStore.accept_group):
            self.write(self.GROUP, group.export)
            return original(self, group)
        KeyStore.accept_group = check_peers_group
        """,
    ),
    Weakening(
        "Alice does not check the group",
        ATTACKS + "parameters[g outside the subgroup]",
        "KeyStore.accept_group = lambda self, group: group",
    ),
    unchecked("g", ATTACKS + "parameters[g = 1]", "g does not generate"),
    unchecked(
        "public value of another length",
        REFUSED_HELLO + "[Alice's hello: a public value one byte longer]",
        "the public value is not as long as p",
    ),
    unchecked(
        "subgroup", ATTACKS + "public_value[Role.BOB-outside the subgroup]", "the public value is not in"
    ),
    Weakening(
        "public value 1",
        ATTACKS + "public_value[Role.ALICE-1]",
        "Group.contains = lambda self, y: y <= self.p - 2 and Integer.jacobi_symbol(y, self.p) == 1",
    ),
    Weakening(
        "public value above p",
        ATTACKS + "public_value[Role.ALICE-p+1]",
        "Group.contains = lambda self, y: y >= 2 and Integer.jacobi_symbol(y, self.p) == 1",
    ),
    Weakening(
        "public value outside the subgroup",
        ATTACKS + "public_value[Role.ALICE-outside the subgroup]",
        "Group.contains = lambda self, y: 2 <= y <= self.p - 2",
    ),
    Weakening(
        "secret exponent before the checks",
        HANDSHAKE + "public_values_are_checked_before_a_secret_exponent_meets_them",
        """
        exponents = {}

        def make_hello(role, *arguments, original=make_hello):
            made = original(role, *arguments)
            exponents[role] = made[1]
            return made

        def settle(bob, alice, original=settle):
            for role, exponent in exponents.items():
                shared_secret(exponent, alice if role is Role.BOB else bob)
            return original(bob, alice)
        """,
    ),
    edited(
        "parameters that another program made not tested",
        DISK + "bad_parameters_are_refused_and_kept[no_safe_prime]",
        ("            check_group(group)\n", "            check_group(group, rounds=0)\n"),
    ),
    edited(
        "parameters that were kept not looked at",
        DISK + "bad_parameters_are_refused_and_kept[flipped_at_36]",
        ("            check_group(group, rounds=0)\n", ""),
    ),
    # ----------------------------------------- secrets
    Weakening(
        "always the same p",
        PRIMITIVES + "the_search_for_p_begins_anywhere",
        "secrets.randbits = lambda bits: 0",
    ),
    exponent(
        "short exponent",
        PRIMITIVES + "a_private_exponent_is_random_bytes_as_many_as_the_group_needs[ffdhe2048-32]",
        "secrets.token_bytes(len(to_bytes(group.p)) // 16)",
    ),
    exponent(
        "exponent of 32 random bits",
        SEEDED,
        "secrets.token_bytes(4).rjust(len(to_bytes(group.p)) // 8, b'\\0')",
    ),
    Weakening(
        "bases that anybody knows",
        PRIMITIVES + "the_bases_of_miller_rabin_are_drawn_from_the_whole_range",
        """
        def miller_rabin_test(candidate, rounds, original=miller_rabin_test):
            return original(candidate, rounds, __import__("random").Random(0).randbytes)
        """,
    ),
    exponent("fresh-exponent", FRESH, 'b"constant" * 4'),
    exponent(
        "one exponent for all sessions",
        FRESH,
        "KEPT.setdefault(group, secrets.token_bytes(len(to_bytes(group.p)) // 8))",
        "KEPT = {}",
    ),
    drawn("fresh-nonce", FRESH, "bytes(NONCE_BYTES)"),
    drawn("nonce from a generator that can be seeded", SEEDED, '__import__("random").randbytes(NONCE_BYTES)'),
    exponent(
        "exponent from a generator that can be seeded",
        SEEDED,
        '__import__("random").randbytes(len(to_bytes(group.p)) // 8)',
    ),
    edited(
        "arithmetic that takes a secret's time",
        PRIMITIVES + "without_constant_time_arithmetic_there_is_no_module",
        ('if Integer.__name__ != "IntegerNat":', "if False:"),
    ),
    Weakening(
        "AES keys in repr",
        HANDSHAKE + "no_secret_in_any_representation",
        "Direction.__repr__ = lambda self: str(vars(self))",
    ),
    Weakening(
        "Z kept",
        HANDSHAKE + "z_and_the_exponents_are_gone_after_the_handshake[without evidence]",
        """
        def initialize(self, sender, signer, z, th, original=Direction.__init__):
            original(self, sender, signer, z, th)
            self.z = z
        Direction.__init__ = initialize
        """,
    ),
    Weakening(
        "exponent kept",
        HANDSHAKE + "z_and_the_exponents_are_gone_after_the_handshake[without evidence]",
        """
        def make_hello(role, identity, group, original=make_hello):
            identity.made = original(role, identity, group)
            return identity.made
        """,
    ),
    Weakening(
        "exponents kept in the module",
        HANDSHAKE + "z_and_the_exponents_are_gone_after_the_handshake[without evidence]",
        """
        MADE = []

        def make_hello(*arguments, original=make_hello):
            MADE.append(original(*arguments))
            return MADE[-1]
        """,
    ),
    Weakening(
        "Z traced",
        "test_verify.py::test_both_screens_show_the_same_values_and_no_secret",
        """
        def derive_keys(z, direction, th, original=derive_keys):
            trace("the keys", Z=z)
            return original(z, direction, th)
        """,
    ),
    # ----------------------------------------- keys and what goes into them
    Weakening(
        "Z unpadded",
        PRIMITIVES + "modexp_keeps_leading_zeros",
        """
        def modexp(base, exponent, modulus, original=modexp):
            return original(base, exponent, modulus).lstrip(b"\\0")
        """,
    ),
    keys_from(
        "Z without its leading zeros",
        SESSION + "[Z and signatures begin with a zero byte]",
        'z.lstrip(b"\\0"), direction, th',
    ),
    Weakening(
        "K and C swapped",
        SESSION + "[ffdhe2048]",
        """
        def derive_keys(z, direction, th, original=derive_keys):
            return original(z, direction, th)[::-1]
        """,
    ),
    Weakening(
        "K and C the same",
        SESSION + "[ffdhe2048]",
        """
        def derive_keys(z, direction, th, original=derive_keys):
            return original(z, direction, th)[:1] * 2
        """,
    ),
    keys_from("K independent of th", MISBINDING, 'z, direction, b""'),
    keys_from("K independent of the direction", ONE_NONCE, 'z, b"", th'),
    keys_from("both directions with one pair of keys", ONE_NONCE, "z, Role.BOB.label, th"),
    keys_from(
        "keys of the other direction",
        SESSION + "[ffdhe2048]",
        "z, next(role.peer.label for role in Role if role.label == direction), th",
    ),
    Weakening("direction", OTHER_DIRECTION, 'Role.label = property(lambda self: b"bob->alice")'),
    Weakening(
        "labels swapped",
        SESSION + "[ffdhe2048]",
        'Role.label = property(lambda self: f"{self.peer.value}->{self.value}".encode())',
    ),
    hashed("th", ATTACKS + "attack[hello]", 'b""'),
    hashed(
        "Bob's hello not in th",
        SESSION + "[ffdhe2048]",
        "frame(alice)",
    ),
    hashed("Alice's hello not in th", MISBINDING, "frame(bob)"),
    hashed("identities not in th", MISBINDING, "bob[:-294] + alice[:-294]"),  # as long as the tests' keys
    hashed(
        "nonces not in th",
        SESSION + "[ffdhe2048]",
        "bob[49:] + alice[49:]",
    ),
    hashed("lengths not in th", SESSION + "[ffdhe2048]", "bob + alice"),
    # ----------------------------------------- RSA keys
    unchecked(
        "size of an RSA key before it is parsed",
        REFUSED_HELLO + "[Alice's hello: an RSA key and 1 KiB]",
        "the RSA key is larger",
    ),
    unchecked("another type of key", ATTACKS + "rsa_key[Role.ALICE-another type]", "the key is not an RSA"),
    unchecked("RSA bits", ATTACKS + "rsa_key[Role.BOB-2047 bits]", "the RSA key has .* bits"),
    unchecked("RSA exponent", ATTACKS + "rsa_key[Role.ALICE-e = 3]", "the RSA key's public exponent"),
    unchecked(
        "canonical DER",
        REFUSED_HELLO + "[Alice's hello: a modulus with a zero byte more]",
        "the RSA key is not in its canonical",
    ),
    unchecked(
        "reflection",
        ATTACKS + "attack[bobs-own-key]",
        "both sides present the same key",
    ),
    # ----------------------------------------- signatures
    unchecked("signature", FORGED + "[Role.BOB-signed by Mallory]", "the record's signature"),
    Weakening(
        "any signature valid",
        PRIMITIVES + "verify_agrees_with_wycheproof[2048]",
        "def verify(key, message, signature): return True",
    ),
    Weakening(
        "no salt",
        PRIMITIVES + "sign_agrees_with_nist",
        """
        def sign(key, message):
            return pss.new(key, salt_bytes=0).sign(message)

        def verify(key, message, signature):
            with contextlib.suppress(ValueError):
                pss.new(key, salt_bytes=0).verify(message, signature)
                return True
            return False
        """,
    ),
    Weakening(
        "decrypted before it is verified",
        RECORDS + "nothing_is_decrypted_before_it_is_verified",
        """
        def open_record(self, record, other, keep=lambda _: None, original=Opener.open):
            body = record[: len(record) - self.signer.size_in_bytes()]
            with contextlib.suppress(ValueError):
                decrypt(self._key, body[:GCM_NONCE], body[GCM_NONCE:-GCM_TAG], body[-GCM_TAG:])
            return original(self, record, other, keep)
        Opener.open = open_record
        """,
    ),
    signed("direction not signed", OTHER_DIRECTION, "th + C"),
    signed(
        "th not signed",
        REFUSED_RECORD + "[Alice's record 3: signed for another transcript hash]",
        "label + C",
    ),
    signed("C not signed", REFUSED_RECORD + "[Alice's record 3: signed for no commitment]", "label + th"),
    signed(
        "C that commits to nothing",
        RECORDS + "a_record_that_opens_to_two_texts_is_signed_for_one_of_them",
        "label + th + bytes(32)",
    ),
    hash_of(
        "record's number not signed",
        FORGED + "[Role.ALICE-dropped, the next one under its number]",
        "ciphertext, tag",
    ),
    hash_of("ciphertext and tag not signed", FORGED + "[Role.BOB-encrypted anew]", "nonce"),
    hash_of("plaintext signed", ON_THE_WIRE, "nonce, decrypt(self._key, nonce, ciphertext, tag)"),
    hash_of(
        "plaintext signed as well",
        ON_THE_WIRE,
        "nonce, ciphertext, tag, decrypt(self._key, nonce, ciphertext, tag)",
    ),
    # ----------------------------------------- encryption
    Weakening(
        "tag",
        FORGED + "[Role.ALICE-ciphertext changed and signed]",
        """
        def decrypt(key, nonce, ciphertext, tag):
            return AES.new(key, AES.MODE_GCM, nonce=nonce, mac_len=GCM_TAG).decrypt(ciphertext)
        """,
    ),
    edited(
        "constant GCM nonce",
        ONE_NONCE,
        ("encrypt(self._key, nonce, plaintext)", "encrypt(self._key, bytes(12), plaintext)"),
        ("decrypt(self._key, nonce, ciphertext, tag)", "decrypt(self._key, bytes(12), ciphertext, tag)"),
    ),
    Weakening(
        "number not advanced",
        ONE_NONCE,
        """
        def begin(self, original=Direction._begin):
            original(self)
            return min(self.number, 1).to_bytes(GCM_NONCE, "big")
        Direction._begin = begin
        """,
    ),
    Weakening(
        "number used again after a failed seal",
        RECORDS + "no_second_record_under_a_number_whatever_interrupted_the_first[encrypt-after it]",
        """
        def begin(self, original=Direction._begin):
            nonce, self.closed = original(self), False
            return nonce
        Direction._begin = begin
        """,
    ),
    Weakening(
        "number used again after Ctrl-C",
        RECORDS + "no_second_record_under_a_number_whatever_interrupted_the_first[send-after it]",
        """
        def seal(self, *arguments, original=Sealer.seal):
            number, latest = self.number, self.latest
            try:
                return original(self, *arguments)
            except KeyboardInterrupt:
                self.number, self.latest, self.closed = number, latest, False
                raise
        Sealer.seal = seal
        """,
    ),
    Weakening("no padding", ON_THE_WIRE, "PADDING = 1"),
    Weakening(
        "padding not checked",
        FORGED + "[Role.ALICE-no padding]",
        'def unpad(data, size, style): return data.rstrip(b"\\0")[:-1]',
    ),
    # ----------------------------------------- records
    Weakening(
        "number",  # the receiver believes what the record says
        ATTACKS + "attack[repeat]",
        """
        def open_record(self, record, other, keep=lambda _: None, original=Opener.open):
            self.number = int.from_bytes(record[:GCM_NONCE], "big")
            return original(self, record, other, keep)
        Opener.open = open_record
        """,
    ),
    after_failure(
        "a direction lives on after a failure",
        FORGED + "[Role.BOB-signature changed]",
        "self.closed = False",
    ),
    after_failure(
        "a failed record counts",
        FORGED + "[Role.BOB-signature changed]",
        "self.closed = False; self.number += 1",
    ),
    after_success(
        "sending after a goodbye",
        RECORDS + "nothing_follows_a_goodbye[Role.BOB]",
        "Sealer.seal",
        "self.closed = False",
    ),
    after_success(
        "receiving after a goodbye",
        RECORDS + "nothing_follows_a_goodbye[Role.BOB]",
        "Opener.open",
        "self.closed = False",
    ),
    unchecked(
        "length of a record",
        RECORDS + "a_record_has_its_length_or_none",
        "the record has an impossible length",
    ),
    unchecked("type", FORGED + "[Role.BOB-unknown type]", "the record is of no known type"),
    unchecked("no type, no reply", FORGED + "[Role.ALICE-too short]", "the record is too short"),
    unchecked("READY first", REFUSED_RECORD + "[Bob's record 0: TEXT]", "READY is record 0"),
    unchecked(
        "length of a text received",
        FORGED + "[Role.BOB-a text over the limit]",
        "the record's body has a wrong length",
    ),
    Weakening(
        "text in Alice's READY",
        REFUSED_RECORD + "[Alice's record 0: with a body]",
        """
        def parse(self, plaintext, original=Opener._parse):
            try:
                return original(self, plaintext)
            except ProtocolError as error:
                if self.sender is not Role.ALICE or self.number or "wrong length" not in str(error):
                    raise
                return Message(RecordType.READY, b"", plaintext[1:33])
        Opener._parse = parse
        """,
    ),
    Weakening(
        "no r in Bob's READY",
        REFUSED_RECORD + "[Bob's record 0: without r]",
        """
        def parse(self, plaintext, original=Opener._parse):
            try:
                return original(self, plaintext)
            except ProtocolError as error:
                if self.sender is not Role.BOB or self.number or "wrong length" not in str(error):
                    raise
                return Message(RecordType.READY, b"", plaintext[1:33])
        Opener._parse = parse
        """,
    ),
    Weakening(
        "length of a text to be sent",
        UNFIT + "[too long]",
        """
        def send(self, text):
            self.sealer.seal(RecordType.TEXT, text.encode(), self.opener, self._send)
        Channel.send = send
        """,
    ),
    edited(
        "UTF-8 received",
        FORGED + "[Role.ALICE-not UTF-8]",
        ("body.decode() if kind", 'body.decode(errors="replace") if kind'),
    ),
    Weakening(
        "UTF-8 to be sent",
        UNFIT + "[a surrogate]",
        """
        def send(self, text):
            self.sealer.seal(RecordType.TEXT, text.encode(errors="surrogatepass"), self.opener, self._send)
        Channel.send = send
        """,
    ),
    unchecked("reply", FORGED + "[Role.ALICE-in reply to the one before]", "the record replies to another"),
    Weakening(
        "empty-close",  # a CLOSE may have any body
        FORGED + "[Role.BOB-a CLOSE with a body]",
        """
        def parse(self, plaintext, original=Opener._parse):
            try:
                return original(self, plaintext)
            except ProtocolError as error:
                if plaintext[0] != RecordType.CLOSE or "wrong length" not in str(error):
                    raise
                return Message(RecordType.CLOSE, b"", plaintext[1:33])
        Opener._parse = parse
        """,
    ),
    edited(
        "what a CLOSE replies to",
        FORGED + "[Role.BOB-a CLOSE in reply to nothing]",
        ("require(message.in_reply_to in may_name", "require(closing or message.in_reply_to in may_name"),
    ),
    edited(
        "a CLOSE that names zeros",
        FORGED + "[Role.ALICE-a CLOSE that names 32 zero bytes]",
        (" - {NOTHING} if closing", " if closing"),
    ),
    edited(
        "a CLOSE that denies what it answered",
        RECORDS + "every_record_in_every_state",
        (" if closing and in_turn else {other.latest}", " if closing else {other.latest}"),
    ),
    edited(
        "a CLOSE that crossed a record",
        RECORDS + "every_record_in_every_state",
        ("{other.latest, other.before} - {NOTHING} if", "{other.latest} if"),
    ),
    after_success(
        "a reply to what was said before",
        RECORDS + "every_record_in_every_state",
        "Direction._count",
        "self.latest = self.before = NOTHING",
    ),
    unchecked("turn", RECORDS + "every_record_in_every_state", "the other side spoke out of turn"),
    Weakening(
        "oneself out of turn",
        RECORDS + "nobody_seals_out_of_turn",
        "Sealer.has_the_turn = lambda self, other: True",
    ),
    Weakening(
        "goodbye not sealed",
        RECORDS + "a_record_has_its_length_or_none",
        """
        def open_record(self, record, other, keep=lambda _: None, original=Opener.open):
            if not record:
                return Message(RecordType.CLOSE, b"", NOTHING)
            return original(self, record, other, keep)
        Opener.open = open_record
        """,
    ),
    Weakening(
        "cut",  # taken for a goodbye
        ATTACKS + "attack[cut]",
        """
        def receive(self, original=Channel.receive):
            try:
                return original(self)
            except ConnectionCut:
                self.sealer.closed = True
                return Message(RecordType.CLOSE, b"", NOTHING)
        Channel.receive = receive
        """,
    ),
    Weakening(
        "goodbye not said",
        ATTACKS + "without_mallory_everything_arrives",
        "Channel.close = lambda self, wait=0.0: self.frames.hang_up(wait)",
    ),
    # ----------------------------------------- form, size and time
    unchecked(
        "fields cut short", REFUSED_HELLO + "[Alice's hello: a byte more]", "a field of the hello is cut"
    ),
    unchecked("version", REFUSED_HELLO + "[Alice's hello: another version]", "the other side does not speak"),
    unchecked("number of fields", REFUSED_HELLO + "[Alice's hello: a field less]", "the hello has too many"),
    unchecked(
        "length of a nonce", REFUSED_HELLO + "[Bob's hello: a nonce of 31 bytes]", "the nonce is not 32"
    ),
    unchecked("limit", ATTACKS + "attack[length]", "a frame of .* bytes, over the limit"),
    Weakening(
        "length of a hello",
        ATTACKS + "a_frame_over_its_limit_is_refused[Role.ALICE-0]",
        "HELLO_LIMIT = 1 << 32",
    ),
    Weakening(
        "length of READY",
        ATTACKS + "a_frame_over_its_limit_is_refused[Role.ALICE-1]",
        "READY_LIMIT = 1 << 32",
    ),
    Weakening(
        "length of a later record",
        ATTACKS + "a_frame_over_its_limit_is_refused[Role.BOB-2]",
        "RECORD_LIMIT = 1 << 32",
    ),
    Weakening(
        "deadline",
        ATTACKS + "attack[slow]",
        """
        def initialize(self, connected, original=FrameSocket.__init__):
            original(self, connected)
            self.deadline = None
        FrameSocket.__init__ = initialize
        """,
    ),
    Weakening(
        "a time-out for every read",
        HANDSHAKE + "the_handshake_has_one_deadline[Role.BOB]",
        """
        FrameSocket.deadline = property(
            lambda self: vars(self)["deadline"] and time.monotonic() + PATIENCE,
            lambda self, value: vars(self).update(deadline=value),
        )
        """,
    ),
    Weakening(
        "a frame that stalls while it is sent",
        HANDSHAKE + "a_send_may_not_stall_and_nothing_follows_it",
        """
        def send(self, *payloads):
            unsent = memoryview(b"".join(map(frame, payloads)))
            while unsent:
                unsent = unsent[self._bounded(None, self.socket.send, unsent) :]
        FrameSocket.send = send
        del TCP_OPTIONS["TCP_USER_TIMEOUT"]  # with which the system notices too
        """,
    ),
    edited(
        "a frame that stalls while it is received",
        HANDSHAKE + "a_frame_that_has_begun_may_not_stall",
        ("self._bounded(PATIENCE if begun else None, ", "self._bounded(None, "),
    ),
    # ----------------------------------------- the order of the handshake
    edited(
        "Bob's READY before he opened Alice's",
        SIGNED,
        (
            "    opener.open(hers, sealer)\n",
            "    opener.number, opener.latest = 1, opener._hash(hers[:-256]).digest()\n",
        ),
        (
            "        for tag, entry in zip(",
            "        opener.number, opener.latest = 0, chat.NOTHING\n"
            "        opener.open(hers, chat.Sealer(Role.BOB, identity, z, th))\n"
            "        for tag, entry in zip(",
        ),
        file=BOB,
    ),
    edited(
        "Bob does not open Alice's READY",
        ATTACKS + "a_key_is_pinned_only_after_its_owner_has_proven_to_hold_it",
        (
            "    opener.open(hers, sealer)\n",
            "    opener.number, opener.latest = 1, opener._hash(hers[:-256]).digest()\n",
        ),
        file=BOB,
    ),
    edited(
        "Bob signs before he checked the pin",
        ATTACKS + "man_in_the_middle_with_her_own_key_is_refused_by_the_pin[Role.ALICE]",
        ("    trust = alice.check(keys[Role.ALICE])\n", ""),
        (
            "        for tag, entry in zip(",
            "        trust = alice.check(keys[Role.ALICE])\n        for tag, entry in zip(",
        ),
        file=BOB,
    ),
    edited(
        "Alice does not open Bob's READY",
        SIGNED,
        (
            "    message = opener.open(his, sealer)\n",
            '    message = chat.Message(RecordType.READY, b"", b"")\n'
            "    opener.number, opener.latest = 1, opener._hash(his[:-256]).digest()\n",
        ),
        ("chat.make_words(th, theirs.nonce, message.body)", '["word"] * 6'),
        file=ALICE,
    ),
    *(
        Weakening(
            f"{who} pins before the other READY was opened",
            test,
            f"""
            def check(self, key, original=PinnedPeer.check):
                trust = original(self, key)
                if (self.name == "alice") == {who == "Bob"}:
                    self.pin(key)
                return trust
            PinnedPeer.check = check
            """,
        )
        for who, test in (
            ("Bob", ATTACKS + "a_key_is_pinned_only_after_its_owner_has_proven_to_hold_it"),
            ("Alice", ATTACKS + "a_key_is_pinned_only_after_its_owner_has_proven_to_hold_it"),
        )
    ),
    edited(
        "Alice signs before she checked the pin",
        ATTACKS + "man_in_the_middle_with_her_own_key_is_refused_by_the_pin[Role.BOB]",
        ("    trust = bob.check(keys[Role.BOB])\n", ""),
        ("    his = frames.receive(", "    trust = bob.check(keys[Role.BOB])\n    his = frames.receive("),
        file=ALICE,
    ),
    edited(
        "Bob's CLOSE at record 0 taken for READY",
        HANDSHAKE + "a_busy_bob_says_so_in_the_place_of_ready[Bob]",
        ("    if message.type is RecordType.CLOSE:\n", "    if False:\n"),
        ("chat.make_words(th, theirs.nonce, message.body)", '["word"] * 6'),
        file=ALICE,
    ),
    edited(
        "a guest let in without the place",
        HANDSHAKE + "a_busy_bob_says_so_in_the_place_of_ready[Bob]",
        (
            "    if not place.acquire(blocking=False):\n",
            "    if not place.acquire(blocking=False) and False:\n",
        ),
        file=BOB,
    ),
    # ----------------------------------------- words
    Weakening(
        "commitment",
        HANDSHAKE + "alice_has_no_channel_with_an_r_that_does_not_fit",
        "def make_words(th, nonce_b, r, original=make_words): return original(th, commit(r), r)",
    ),
    Weakening(
        "a commitment to nothing",
        PRIMITIVES + "the_commitment_is_the_hash_of_the_specification_and_fits_one_r",
        "def commit(r): return bytes(32)",
    ),
    Weakening(
        "commitment compared in four bytes",
        PRIMITIVES + "the_commitment_is_the_hash_of_the_specification_and_fits_one_r",
        """
        def make_words(th, nonce_b, r, original=make_words):
            return original(th, nonce_b[:4] + commit(r)[4:], r)
        """,
    ),
    drawn(
        "r that anybody can compute",
        SEEDED,
        "SHA256.new(modexp(group.g, exponent, group.p)).digest() if role is Role.BOB "
        "else secrets.token_bytes(NONCE_BYTES)",
    ),
    Weakening(
        "words without r",
        HANDSHAKE + "with_somebody_in_between_the_words_differ[r]",
        'def make_words(th, nonce_b, r, original=make_words): return original(th, commit(b""), b"")',
    ),
    Weakening(
        "words without th",
        HANDSHAKE + "with_somebody_in_between_the_words_differ[nonce_A]",
        'def make_words(th, nonce_b, r, original=make_words): return original(b"", nonce_b, r)',
    ),
    # ----------------------------------------- trust
    Weakening(
        "pin",  # another key than the pinned one is a new one, about which a person is asked
        ATTACKS + "man_in_the_middle_with_her_own_key_is_refused_by_the_pin[Role.ALICE]",
        """
        def check(self, key, original=PinnedPeer.check):
            pins, shown = self.pins(), fingerprint(key)
            self.pins = lambda: [pin for pin in pins if pin.name != self.name or pin.fingerprint == shown]
            trust = original(self, key)
            del self.pins
            return trust
        PinnedPeer.check = check
        """,
    ),
    Weakening(
        "another key taken for the pinned one",
        DISK + "another_key_is_refused_and_nothing_is_changed",
        """
        def check(self, key, original=PinnedPeer.check):
            pinned = self.only is None and self.name in (pin.name for pin in self.pins())
            return Trust(True, True) if pinned else original(self, key)
        PinnedPeer.check = check
        """,
    ),
    Weakening(
        "peer",  # --peer is asked for, and not compared
        ATTACKS + "man_in_the_middle_at_first_contact_is_refused_by_the_fingerprint[Role.BOB]",
        """
        def check(self, key, original=PinnedPeer.check):
            self.only = self.only and fingerprint(key)
            return original(self, key)
        PinnedPeer.check = check
        """,
    ),
    Weakening(
        "--peer compared in part",
        DISK + "the_whole_fingerprint_is_compared",
        """
        def check(self, key, original=PinnedPeer.check):
            if self.only and fingerprint(key)[:20] == self.only[:20]:
                self.only = fingerprint(key)
            return original(self, key)
        PinnedPeer.check = check
        """,
    ),
    *(
        Weakening(
            f"{who}'s --peer ignored",
            test,
            """
            def without_peer(store, name, only=None, can_ask=True, original=chat.PinnedPeer):
                return original(store, name, None, can_ask)
            chat.PinnedPeer = without_peer
            """,
            file=file,
        )
        for who, file, test in (
            ("Bob", BOB, TRUST + "the_key_that_was_asked_for_is_pinned_unasked_in_place_of_another[False]"),
            ("Alice", ALICE, MESSAGES + "[not the key that was asked for]"),
        )
    ),
    pinning(
        "pin not checked again",
        DISK + "a_key_pinned_by_another_program_after_the_check_is_found",
        "pass",
    ),
    pinning(
        "one of several pins lost",
        DISK + "each_of_several_pinned_keys_is_accepted",
        "pins = [pin for pin in pins if pin.name != self.name]",
    ),
    Weakening(
        "nothing pinned",
        DISK + "a_key_is_new_until_it_is_pinned",
        "PinnedPeer.pin = lambda self, key: None",
    ),
    Weakening(
        "the pin of another name",
        DISK + "what_is_known_under_other_names_is_told",
        """
        def pins(self, original=PinnedPeer.pins):
            pins = original(self)
            return [p._replace(name=self.name) if self.name.startswith(p.name or "#") else p for p in pins]
        PinnedPeer.pins = pins
        """,
    ),
    pinning(
        "--peer leaves the old pin",
        DISK + "the_key_asked_for_takes_the_place_of_the_old_ones",
        "self.check(key)",
    ),
    edited(
        "any name in known_peers",
        DISK + "a_line_that_is_not_understood_is_refused_by_its_number[[bob.example]:65432-bob.example-any]",
        ("not re.fullmatch(pattern, name.lower()) or ", ""),
    ),
    Weakening(
        "pinned before the question",
        TRUST + "alice_says_no[no\\r-]",
        """
        def meet(console, channel, peer, original=meet):
            if not channel.trust.known:
                peer.pin(channel.opener.signer)
            original(console, channel, peer)
        """,
    ),
    Weakening(
        "pinned without a person",
        TRUST + "a_stranger_who_is_gone_at_once_is_never_pinned",
        "def ask_for_words(console, channel): pass",
    ),
    Weakening(
        "a new key accepted on pipes",
        HANDSHAKE + "nothing_is_signed_for_a_new_key_with_nobody_to_ask[Role.BOB]",
        """
        def initialize(self, store, name, only=None, can_ask=True, original=PinnedPeer.__init__):
            original(self, store, name, only)
        PinnedPeer.__init__ = initialize

        def ask_for_words(console, channel, original=ask_for_words):
            if console.can_ask:
                original(console, channel)
        """,
    ),
    Weakening(
        "a question answered by what was typed before",
        TRUST + "a_yes_from_before_the_question_is_no_answer",
        "Console.drop_typed = lambda self, quiet=QUIET: True",
    ),
    Weakening(
        "a record opened while the question stands",
        TRUST + "a_first_message_waits_until_bob_has_answered[no]",
        """
        def ask_for_words(console, channel, original=ask_for_words):
            try:
                original(console, channel)
            except TrustError:
                if channel.has_something:
                    channel.receive()
                raise
        """,
    ),
    edited(
        "words",  # any three are taken for the other side's
        TRUST + "who_types_other_words_is_told_so_and_never_a_right_one",
        ("        if words == channel.other_words:\n", "        if len(words) == 3:\n"),
    ),
    edited(
        "two of three words compared",
        TRUST + "who_types_other_words_is_told_so_and_never_a_right_one",
        (
            "        if words == channel.other_words:\n",
            "        if len(words) == 3 and words[:2] == channel.other_words[:2]:\n",
        ),
    ),
    edited(
        "a yes taken for the words",
        TRUST + "who_types_other_words_is_told_so_and_never_a_right_one",
        (
            "        if words == channel.other_words:\n",
            '        if words in (channel.other_words, ["yes"]):\n',
        ),
    ),
    # ----------------------------------------- Bob's door
    edited(
        "the oldest stranger gives way, wherever from",
        SERVER + "the_oldest_of_the_address_that_has_the_most_gives_way[there1-203.0.113.1-1]",
        (" if thread.name == most)\n", " if most)\n"),
        file=BOB,
    ),
    Weakening(
        "each IPv6 address by itself",
        SERVER + "what_counts_as_one_address[2001:db8:1:2:3:4:5:6-2001:db8:1:2::/64]",
        "def source(address): return address",
        file=BOB,
    ),
    # ----------------------------------------- what a transcript proves
    unchecked(
        "a transcript's order",
        REFUSED + "[the reply before the request]",
        "the other side spoke out of turn|the record replies to another|record .* where record",
    ),
    unchecked(
        "a transcript without both READY",
        REFUSED + "[Alice's READY is missing]",
        "a transcript begins with",
    ),
    unchecked(
        "a transcript after its goodbye",
        REFUSED + "[a byte after the goodbye]",
        "something follows the goodbye",
    ),
    unchecked(
        "size of an entry", REFUSED + "[a request over the limit]", "an entry of .* bytes, over the limit"
    ),
    unchecked("an entry of no known kind", REFUSED + "[an unknown tag]", "an entry is of no known kind"),
    unchecked("a cut entry", REFUSED + "[it ends inside a request]", "the transcript ends in the middle"),
    unchecked("length of Z", REFUSED + "[Z and a zero byte]", "Z is not as long as p"),
    edited(
        "commitment not checked in a transcript",
        REFUSED + "[another r]",
        ("make_words(th, bob.nonce, message.body)", "make_words(th, commit(message.body), message.body)"),
    ),
    edited(
        "parameters not checked in a transcript",
        REFUSED + "[p composite]",
        ("    check_group(bob.group)\n", ""),
    ),
    edited(
        "q not tested in a transcript",
        TRANSCRIPT + "a_group_is_tested_in_full_whoever_vouches_for_it",
        ("    check_group(bob.group)\n", "    check_group(bob.group, rounds=0)\n"),
    ),
    Weakening(
        "a goodbye after the peer's",
        HANDSHAKE + "nothing_is_sent_after_the_peers_goodbye[Role.BOB]",
        """
        def receive(self, original=Channel.receive):
            before, message = self.sealer.closed, original(self)
            self.sealer.closed = before
            return message
        Channel.receive = receive
        """,
    ),
    edited(
        "a goodbye that names what is not in the file",
        RECORDS + "a_record_counts_when_it_is_kept_and_not_before[keep]",
        (
            "        keep(record)\n        self._count(signed.digest())\n",
            "        self._count(signed.digest())\n        keep(record)\n",
        ),
    ),
    edited(
        "a goodbye that the disk has no room for",
        TRANSCRIPT + "a_goodbye_that_cannot_be_kept_is_said_all_the_same",
        (
            "        with contextlib.suppress(FileError):  # a full disk",
            "        with contextlib.suppress():  # a full disk",
        ),
    ),
    Weakening(
        "half an entry",
        DISK + "a_transcript_that_cannot_go_on_ends_with_its_last_whole_entry[ctrl_c]",
        """
        def write(self, data):
            with disk("write", self.path):
                while data:
                    data = data[self._file.write(data) :]
        Transcript._write = write
        """,
    ),
    # ----------------------------------------- files
    Weakening(
        "identity readable by others",
        DISK + "home_is_private_whatever_the_umask[0o22]",
        "def _open_private(path, flags): return os.open(path, flags | os.O_NOFOLLOW, 0o644)",
    ),
    edited(
        "folder readable by others",
        DISK + "home_is_private_whatever_the_umask[0o22]",
        ("self.folder.mkdir(mode=0o700", "self.folder.mkdir(mode=0o755"),
    ),
    edited(
        "symbolic links followed",
        DISK + "what_is_no_file_of_ones_own_is_refused[link-identity.pem]",
        ('flags |= getattr(os, "O_NOFOLLOW", 0) |', "flags |="),
    ),
    Weakening(
        "owner",
        DISK + "home_of_another_user_is_refused",
        """
        def _check_owner(path, info, forbidden, original=_check_owner):
            if info.st_uid == os.geteuid():
                original(path, info, forbidden)
        """,
    ),
    Weakening(
        "mode",
        DISK + "what_is_no_file_of_ones_own_is_refused[all_write-known_peers]",
        """
        def _check_owner(path, info, forbidden, original=_check_owner):
            original(path, info, 0)
        """,
    ),
    Weakening(
        "mode of the folder",
        DISK + "home_is_refused_when_others_can_write_to_it[0o777]",
        """
        def _check_owner(path, info, forbidden, original=_check_owner):
            original(path, info, 0 if stat.S_ISDIR(info.st_mode) else forbidden)
        """,
    ),
    Weakening(
        "identity that others can read",
        DISK + "only_the_identity_must_not_be_readable[0o644]",
        """
        def read(self, name, forbidden=0o022, original=KeyStore.read):
            return original(self, name, forbidden & 0o022)
        KeyStore.read = read
        """,
    ),
    # ----------------------------------------- what is shown
    Weakening(
        "controls as they are",
        PRIMITIVES
        + "what_could_drive_a_terminal_is_shown_escaped[\\x1b[2J\\x1b[1;1H-\\\\x1b[2J\\\\x1b[1;1H]",
        "def printable(text): return text",
    ),
    Weakening(
        "what the peer says, unescaped",
        ATTACKS + "a_text_neither_drives_the_terminal_nor_imitates_the_program",
        'def screen_lines(text, columns=None): return text.split("\\n")',
    ),
    Weakening(
        "what the program says, unescaped",
        ATTACKS + "a_text_neither_drives_the_terminal_nor_imitates_the_program",
        """
        def notice(self, text):
            self.write(text + "\\n", sys.stderr)
        Console.notice = notice
        """,
    ),
    edited(
        "no bar",
        ATTACKS + "a_text_neither_drives_the_terminal_nor_imitates_the_program",
        ("bar.join(rows)", '"\\n".join(rows)'),
    ),
    Weakening(
        "cut reported as success",
        TALK + "a_killed_program_is_told_from_a_goodbye[Role.ALICE-True]",
        "ConnectionCut.status = 0",
    ),
]
WEAKENINGS = {weakening.name: weakening for weakening in LIST}
