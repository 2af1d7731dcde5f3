"""Weaken the programs, one check at a time: the test meant for that check must go red.

A security test that stays green without the thing it tests is worse than none: usually another layer has
refused first. So each entry names one weakening and the one test that is there because of it. Weakened copies
run in a process of their own; that the same tests are green without a weakening, one run of all shows.
"""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
from pathlib import Path
from typing import NamedTuple

import pytest
from conftest import ROOT, Keys

COPIED = ("crypto_utils.py", "bob_server.py", "alice_client.py", ".pytest.ini", "tests")
TESTS_FAILED, TESTS_PASSED = 1, 0  # pytest's exit statuses; from 2 on, tests could not be run
SECONDS = 100  # a weakened program may wait for what never comes

UTILS, BOB, ALICE = "crypto_utils.py", "bob_server.py", "alice_client.py"
ATTACKS, FILES = "test_attacks.py::test_", "test_files.py::test_"
PRIMITIVES, PROGRAMS = "test_primitives.py::test_", "test_programs.py::test_"
TRANSCRIPT = "test_transcript.py::test_"
SCREEN = "a_text_of_the_peers_neither_drives_the_terminal_nor_imitates_the_program"


class Weakening(NamedTuple):
    """What is weakened, in which file, by which replacements, and the test that must notice.

    Most are one line in one place; where both ends must agree for the conversation to work on, two.
    """

    name: str
    file: str
    test: str
    edits: tuple[tuple[str, str], ...]


def weak(name: str, test: str, *edits: tuple[str, str], file: str = UTILS) -> Weakening:
    return Weakening(name, file, f"tests/{test}", edits)


def unchecked(name: str, test: str, condition: str) -> Weakening:
    """Drop one check, given how its condition begins."""
    return weak(name, test, (f"require({condition}", f"require(True or {condition}"))


WEAKENINGS = [
    # ------------------------------------------------- parameters and public values
    unchecked("size of p", ATTACKS + "parameters[p of 2047 bits]", "p.bit_length() in GROUP_BITS"),
    unchecked("length of p", ATTACKS + "parameters[p of 4097 bits]", "all(len(n) <= GROUP_BITS[-1]"),
    unchecked("p padded", ATTACKS + "parameters[p padded]", 'all(n[:1] != b"\\0"'),
    unchecked("p even", ATTACKS + "parameters[p even]", "p % 2 == 1"),
    unchecked("p not safe", ATTACKS + "parameters[p composite]", "is_safe_prime(p)"),
    weak(
        "q not tested",
        ATTACKS + "parameters[p prime, q composite]",
        ("and bool(test_probable_prime(q))", ""),
    ),
    weak(
        "p not tested",  # "q prime, p composite" above is divisible by 3
        PRIMITIVES + "is_safe_prime_refuses[q prime, no factor 3 in p]",
        ("and is_power_one(4, q, p)", ""),
    ),
    weak(
        "any p taken once another one was tested",
        ATTACKS + "parameters[p composite]",
        ("(checked_before is None or p != checked_before.p)", "checked_before is None"),
    ),
    weak(
        "Alice does not check the group",
        ATTACKS + "parameters[g outside the subgroup]",
        ("        check_group(group, checked_before)\n    narrate", "        pass\n    narrate"),
    ),
    unchecked("g", ATTACKS + "parameters[g = 1]", "group.contains(g)"),
    unchecked(
        "public value of another length",
        ATTACKS + "public_value_of_another_length[Role.ALICE-257]",
        "len(self.public_value) == byte_length(group.p)",
    ),
    unchecked(
        "public value",
        ATTACKS + "public_value[Role.BOB-outside the subgroup]",
        "group.contains(y)",
    ),
    weak(
        "public value 1",
        ATTACKS + "public_value[Role.ALICE-1]",
        ("return 2 <= y <= self", "return y <= self"),
    ),
    weak("public value above p", ATTACKS + "public_value[Role.ALICE-p+1]", ("y <= self.p - 2 and", "y and")),
    weak(
        "public value outside the subgroup",
        ATTACKS + "public_value[Role.ALICE-outside the subgroup]",
        (" and is_square(y, self.p)", ""),
    ),
    weak(
        "secret exponent before the checks",
        ATTACKS + "public_values_are_checked_before_a_secret_exponent_meets_them",
        (
            "        key, y = peer.check(self.group)",
            '        power(int.from_bytes(peer.public_value, "big"), self.exponent, self.group.p)\n'
            "        key, y = peer.check(self.group)",
        ),
    ),
    weak(
        "parameters on disk not tested",
        FILES + "bad_parameters_are_refused_and_kept[no_safe_prime]",
        (" and _fermat(group.q)", ""),
    ),
    # ------------------------------------------------- secrets
    weak(
        "always the same p",
        ATTACKS + "the_search_for_p_begins_anywhere",
        ("secrets.randbelow(1 << (bits - 1))", "0"),
    ),
    weak(
        "short exponent",
        PRIMITIVES + "a_private_exponent_is_random_bytes_as_many_as_the_group_needs[ffdhe2048-32]",
        ("random(byte_length(self.p) // 8)", "random(byte_length(self.p) // 16)"),
    ),
    weak(
        "constant exponent",
        ATTACKS + "every_session_has_fresh_values_so_that_stolen_keys_open_no_recording",
        ("exponent = group.private_exponent(random)", 'exponent = b"constant" * 4'),
    ),
    weak(
        "one exponent for all sessions",
        ATTACKS + "every_session_has_fresh_values_so_that_stolen_keys_open_no_recording",
        (
            "exponent = group.private_exponent(random)",
            "exponent = globals().setdefault(role, group.private_exponent(random))",
        ),
    ),
    weak(
        "constant session nonce",
        ATTACKS + "every_session_has_fresh_values_so_that_stolen_keys_open_no_recording",
        ("random(NONCE_BYTES)", "bytes(NONCE_BYTES)"),
    ),
    weak(
        "session nonce from a generator that can be seeded",
        ATTACKS + "no_secret_comes_from_a_generator_that_can_be_seeded",
        ("random(NONCE_BYTES)", '__import__("random").randbytes(NONCE_BYTES)'),
    ),
    weak(
        "exponent from a generator that can be seeded",
        ATTACKS + "no_secret_comes_from_a_generator_that_can_be_seeded",
        ("random(byte_length(self.p) // 8)", '__import__("random").randbytes(byte_length(self.p) // 8)'),
    ),
    weak(
        "arithmetic that takes a secret's time",
        PRIMITIVES + "power_refuses_to_run_without_constant_time_arithmetic",
        ('if _implementation.get("library") != "nat":', "if False:"),
    ),
    weak(
        "identity in repr",
        ATTACKS + "no_secret_in_any_representation",
        ("identity: RsaKey = field(repr=False)", "identity: RsaKey"),
    ),
    weak(
        "exponent in repr",
        ATTACKS + "no_secret_in_any_representation",
        ("exponent: bytes = field(repr=False)", "exponent: bytes"),
    ),
    weak(
        "Z in repr",
        ATTACKS + "no_secret_in_any_representation",
        ("z: bytes = field(repr=False)", "z: bytes"),
    ),
    weak(
        "AES keys in repr",
        ATTACKS + "no_secret_in_any_representation",
        ('return "DirectionKeys(...)"', "return str(tuple(self))"),
    ),
    weak(
        "Z narrated",
        ATTACKS + "no_secret_in_what_is_narrated",
        ('{"th": agreement.th}', '{"th": agreement.th, "Z": z}'),
    ),
    # ------------------------------------------------- keys and what goes into them
    weak(
        "Z unpadded",
        PRIMITIVES + "power_keeps_leading_zeros",
        ("to_bytes(byte_length(modulus))", "to_bytes()"),
    ),
    weak(
        "Z without its leading zeros",
        ATTACKS + "a_session_is_what_the_design_says_byte_by_byte",
        (
            "z = power(y, self.exponent, self.group.p)",
            'z = power(y, self.exponent, self.group.p).lstrip(b"\\0")',
        ),
    ),
    weak(
        "K and C swapped",
        PRIMITIVES + "keys_are_the_one_step_derivation_of_the_design",
        ("DirectionKeys(key, commitment)", "DirectionKeys(commitment, key)"),
    ),
    weak(
        "K and C the same",
        PRIMITIVES + "keys_are_the_one_step_derivation_of_the_design",
        ("for block in (1, 2)", "for block in (1, 1)"),
    ),
    weak(
        "K independent of th",
        ATTACKS + "misbinding_bob_does_not_take_alices_words_for_mallorys",
        ('b" key " + direction + th', 'b" key " + direction'),
    ),
    weak(
        "K independent of the direction",
        ATTACKS + "no_two_records_share_a_nonce_and_a_key",
        ('b" key " + direction + th', 'b" key " + th'),
    ),
    weak(
        "both directions with one pair of keys",
        ATTACKS + "no_two_records_share_a_nonce_and_a_key",
        ("self.z, sender.label, self.th", "self.z, Role.BOB.label, self.th"),
    ),
    weak(
        "one label for both directions",
        ATTACKS + "a_record_of_the_other_direction_is_refused_even_if_all_keys_were_the_same",
        ('f"{self.value}->{self.peer.value}"', '"bob->alice"'),
    ),
    weak(
        "labels swapped",
        ATTACKS + "a_session_is_what_the_design_says_byte_by_byte",
        ('f"{self.value}->{self.peer.value}"', 'f"{self.peer.value}->{self.value}"'),
    ),
    weak(
        "keys of the other direction",
        ATTACKS + "a_session_is_what_the_design_says_byte_by_byte",
        ("self.z, sender.label, self.th", "self.z, sender.peer.label, self.th"),
    ),
    weak(
        "Bob's hello not in th",
        ATTACKS + "a_field_that_makes_no_other_secret_is_in_the_transcript_hash[RSA_bob]",
        ("frame(self.hello_bob) + frame(self.hello_alice)", "frame(self.hello_alice)"),
    ),
    weak(
        "Alice's hello not in th",
        ATTACKS + "misbinding_bob_does_not_take_alices_words_for_mallorys",
        ("frame(self.hello_bob) + frame(self.hello_alice)", "frame(self.hello_bob)"),
    ),
    weak(
        "identities not in th",  # the tests' keys are 294 bytes long in DER
        ATTACKS + "misbinding_bob_does_not_take_alices_words_for_mallorys",
        (
            "frame(self.hello_bob) + frame(self.hello_alice)",
            "self.hello_bob[:-294] + self.hello_alice[:-294]",
        ),
    ),
    weak(
        "nonces not in th",
        ATTACKS + "a_field_that_makes_no_other_secret_is_in_the_transcript_hash[nonce_A]",
        ("frame(self.hello_bob) + frame(self.hello_alice)", "self.hello_bob[49:] + self.hello_alice[49:]"),
    ),
    weak(
        "lengths not in th",
        ATTACKS + "a_session_is_what_the_design_says_byte_by_byte",
        ("frame(self.hello_bob) + frame(self.hello_alice)", "self.hello_bob + self.hello_alice"),
    ),
    # ------------------------------------------------- RSA keys
    unchecked(
        "size of an RSA key before it is parsed",
        PRIMITIVES + "load_public_key_refuses[over 1 KiB]",
        "len(der) <= RSA_DER_LIMIT",
    ),
    unchecked(
        "another type of key",
        ATTACKS + "rsa_key[Role.ALICE-another type]",
        "_RSA_ENCRYPTION in der[:19]",
    ),
    unchecked("RSA bits", ATTACKS + "rsa_key[Role.BOB-2047 bits]", "key.size_in_bits() in RSA_BITS"),
    unchecked("RSA exponent", ATTACKS + "rsa_key[Role.ALICE-e = 3]", "key.e == RSA_EXPONENT"),
    unchecked(
        "canonical DER",
        PRIMITIVES + "load_public_key_refuses[leading zero in n]",
        "public_der(key) == der",
    ),
    unchecked(
        "reflection",
        ATTACKS + "a_stolen_key_does_not_pose_as_the_peer_to_its_owner[Role.BOB]",
        "peer.rsa != public_der(self.identity)",
    ),
    # ------------------------------------------------- signatures
    unchecked("signature", ATTACKS + "record[Role.BOB-signed by Mallory]", "verify(self.signer, signed"),
    weak(
        "any signature valid",
        PRIMITIVES + "verify_agrees_with_wycheproof[2048]",
        ("pss.new(key, salt_bytes=32).verify(message, signature)", "pass"),
    ),
    weak(
        "no salt",
        PRIMITIVES + "sign_agrees_with_nist",
        ("salt_bytes=32, rand_func=random", "salt_bytes=0"),
        ("salt_bytes=32).verify", "salt_bytes=0).verify"),
    ),
    weak(
        "decrypted before it is verified",
        ATTACKS + "nothing_is_decrypted_before_it_is_verified",
        (
            "        require(verify(self.signer",
            "        with contextlib.suppress(ValueError):\n"
            "            decrypt(self._keys.key, nonce, body[GCM_NONCE:-GCM_TAG], body[-GCM_TAG:])\n"
            "        require(verify(self.signer",
        ),
    ),
    weak(
        "direction not signed",
        ATTACKS + "a_record_of_the_other_direction_is_refused_even_if_all_keys_were_the_same",
        ('b" signature " + sender.label + th', 'b" signature " + th'),
    ),
    weak(
        "th not signed",
        ATTACKS + "the_signature_covers_what_is_never_sent[th]",
        ("sender.label + th + keys.commitment", "sender.label + keys.commitment"),
    ),
    weak(
        "C not signed",
        ATTACKS + "the_signature_covers_what_is_never_sent[commitment]",
        ("th + keys.commitment", "th"),
    ),
    weak(
        "record's number not signed",
        ATTACKS + "record[Role.ALICE-dropped, the next one in its place]",
        (
            "self.signed(*body)",
            "self.signed(*body[1:])",
        ),
        ("self.signed(body)", "self.signed(body[12:])"),
    ),
    weak(
        "ciphertext and tag not signed",
        ATTACKS + "record[Role.BOB-encrypted anew]",
        (
            "self.signed(*body)",
            "self.signed(nonce)",
        ),
        ("self.signed(body)", "self.signed(nonce)"),
    ),
    weak(
        "plaintext signed",
        ATTACKS + "nothing_on_the_wire_depends_on_the_text_but_its_length_class",
        (
            "self.signed(*body)",
            "self.signed(nonce, plaintext)",
        ),
        (
            "self.signed(body)",
            "self.signed(nonce, decrypt(self._keys.key, nonce, body[GCM_NONCE:-GCM_TAG], body[-GCM_TAG:]))",
        ),
    ),
    weak(
        "plaintext signed as well",
        ATTACKS + "nothing_on_the_wire_depends_on_the_text_but_its_length_class",
        (
            "self.signed(*body)",
            "self.signed(*body, plaintext)",
        ),
        (
            "self.signed(body)",
            "self.signed(body, decrypt(self._keys.key, nonce, body[GCM_NONCE:-GCM_TAG], body[-GCM_TAG:]))",
        ),
    ),
    # ------------------------------------------------- encryption
    weak(
        "tag",
        ATTACKS + "record[Role.ALICE-ciphertext changed and signed]",
        (
            "decrypt_and_verify(ciphertext, tag)",
            "decrypt(ciphertext)",
        ),
    ),
    weak(
        "constant GCM nonce",
        ATTACKS + "no_two_records_share_a_nonce_and_a_key",
        ("encrypt(self._keys.key, nonce, plaintext)", "encrypt(self._keys.key, bytes(12), plaintext)"),
        ("decrypt(self._keys.key, nonce, ", "decrypt(self._keys.key, bytes(12), "),
    ),
    weak(
        "number not advanced",
        ATTACKS + "no_two_records_share_a_nonce_and_a_key",
        (
            "        if kind is not Kind.CLOSE:\n            self._next = number + 1",
            "        if kind is not Kind.CLOSE:\n            self._next = 1",
        ),
    ),
    weak(
        "number put back after a failed seal",
        ATTACKS + "no_second_record_under_a_number_of_which_the_first_failed",
        ("        plaintext = b", "        self._next = number\n        plaintext = b"),
    ),
    weak(
        "no padding",
        ATTACKS + "nothing_on_the_wire_depends_on_the_text_but_its_length_class",
        ("\nPADDING = 256", "\nPADDING = 1"),
    ),
    weak(
        "padding not checked",
        ATTACKS + "record[Role.ALICE-no padding]",
        ('unpad(plaintext[-PADDING:], PADDING, style="iso7816")', 'plaintext[-PADDING:].rstrip(b"\\0")[:-1]'),
    ),
    # ------------------------------------------------- records
    weak(
        "number not checked",
        ATTACKS + "a_record_repeated_is_refused",
        ("received == number,", "True,"),
        ("decrypt(self._keys.key, nonce, ", "decrypt(self._keys.key, body[:GCM_NONCE], "),
    ),
    weak(
        "a direction lives on after a failure",
        ATTACKS + "a_forged_record_leaves_the_number_as_it_was",
        ("        padded = split - GCM", "        self._next = number\n        padded = split - GCM"),
    ),
    weak(
        "a failed record counts",
        ATTACKS + "a_forged_record_leaves_the_number_as_it_was",
        ("        padded = split - GCM", "        self._next = number + 1\n        padded = split - GCM"),
    ),
    weak(
        "sending after a goodbye",
        ATTACKS + "nothing_follows_a_goodbye",
        ("        if kind is not Kind.CLOSE:", "        if True:"),
    ),
    weak(
        "receiving after a goodbye",
        ATTACKS + "nothing_follows_a_goodbye",
        ("        if kind is not Kind.CLOSE:", "        if True:"),
    ),
    unchecked("length of a record", ATTACKS + "record[Role.ALICE-empty]", "padded >= PADDING"),
    unchecked("type", ATTACKS + "record[Role.BOB-unknown type]", "unpadded[0] in list(Kind)"),
    unchecked("type and answers", ATTACKS + "record[Role.ALICE-too short]", "len(unpadded) > len(NOTHING)"),
    unchecked(
        "READY first",
        ATTACKS + "the_first_record_is_ready_and_nothing_else[Role.BOB]",
        "(kind is Kind.READY) == (number == 0)",
    ),
    weak(
        "text in READY",
        ATTACKS + "the_first_record_is_ready_and_nothing_else[Role.ALICE]",
        ("(0 if kind is Kind.READY else TEXT_LIMIT)", "TEXT_LIMIT"),
    ),
    unchecked(
        "length of a text received",
        ATTACKS + "record[Role.BOB-a byte over the limit]",
        "len(encoded) <= (0 if",
    ),
    weak(
        "length of a text to be sent",
        ATTACKS + "an_unfit_text_is_refused_at_home_and_the_chat_goes_on[too long]",
        ("if len(encoded) > TEXT_LIMIT:", "if False:"),
    ),
    weak(
        "UTF-8 received",
        ATTACKS + "record[Role.ALICE-not UTF-8]",
        ('str(encoded, "utf-8")', 'str(encoded, "utf-8", "replace")'),
    ),
    weak(
        "UTF-8 to be sent",
        ATTACKS + "an_unfit_text_is_refused_at_home_and_the_chat_goes_on[a surrogate]",
        ("encoded = text.encode()", 'encoded = text.encode(errors="surrogatepass")'),
    ),
    weak(
        "what a record answers",
        ATTACKS + "record[Role.ALICE-answers the one before]",
        (
            "message.answers == other.latest or (closing and in_turn and message.answers == other.before)",
            "True",
        ),
    ),
    weak(
        "what a CLOSE answers",
        ATTACKS + "record[Role.BOB-a CLOSE that answers nothing]",
        ("(closing and in_turn and message.answers == other.before)", "closing"),
    ),
    weak(
        "a CLOSE that denies what it answered",
        ATTACKS + "a_goodbye_cannot_deny_what_its_sender_answered[Role.ALICE]",
        ("closing and in_turn and message", "closing and message"),
    ),
    weak(
        "a CLOSE that crossed a record",
        ATTACKS + "a_goodbye_that_crossed_a_record_tells_that_it_was_not_received[Role.BOB]",
        (" or (closing and in_turn and message.answers == other.before)", ""),
    ),
    weak(
        "an answer to what was said before",
        TRANSCRIPT + "whoever_keeps_a_transcript_cannot_change_what_he_was_answered",
        ("signed.digest(), self.latest", "NOTHING, NOTHING"),
    ),
    unchecked(
        "the peer out of turn",
        ATTACKS + "speaking_out_of_turn_is_refused",
        "in_turn or closing",
    ),
    weak(
        "oneself out of turn", ATTACKS + "one_cannot_speak_out_of_turn", ("if not self.my_turn:", "if False:")
    ),
    weak(
        "goodbye not sealed",
        ATTACKS + "record[Role.BOB-empty]",
        (
            "self._opener.open_in_order(record, self._sealer)",
            "self._opener.open_in_order(record, self._sealer) if record else "
            'Message(Kind.CLOSE, "", NOTHING)',
        ),
    ),
    weak(
        "cut taken for a goodbye",
        ATTACKS + "a_cut_in_the_place_of_a_goodbye_is_none",
        (
            "        record = self.line.receive(RECORD_LIMIT)",
            "        try:\n"
            "            record = self.line.receive(RECORD_LIMIT)\n"
            "        except ConnectionCut:\n"
            '            return Message(Kind.CLOSE, "", NOTHING)',
        ),
    ),
    weak(
        "goodbye not said",
        ATTACKS + "without_mallory_everything_arrives[ffdhe2048]",
        ("self._send(Kind.CLOSE, reason)", "pass"),
    ),
    # ------------------------------------------------- form, size and time
    unchecked("fields cut short", ATTACKS + "form_of_a_hello[Role.ALICE-a byte more]", "end <= len(data)"),
    unchecked("version", ATTACKS + "form_of_a_hello[Role.BOB-another version]", "fields[:1] == [VERSION]"),
    unchecked(
        "number of fields", ATTACKS + "form_of_a_hello[Role.ALICE-one field less]", "len(fields) == (6 if"
    ),
    unchecked(
        "length of a nonce", ATTACKS + "form_of_a_hello[Role.BOB-short nonce]", "len(nonce) == NONCE_BYTES"
    ),
    weak(
        "length of a hello",
        ATTACKS + "form_of_a_hello[Role.ALICE-too long]",
        ("HELLO_LIMIT = 8 * 1024", "HELLO_LIMIT = 1 << 32"),
    ),
    weak(
        "length of READY",
        ATTACKS + "a_record_over_its_limit_is_refused[Role.ALICE-1]",
        ("READY_LIMIT = 4 * 1024", "READY_LIMIT = 1 << 32"),
    ),
    weak(
        "length of a later record",
        ATTACKS + "a_record_over_its_limit_is_refused[Role.BOB-2]",
        ("self.line.receive(RECORD_LIMIT)", "self.line.receive(1 << 32)"),
    ),
    weak(
        "Bob's handshake without a deadline",
        ATTACKS + "the_handshake_has_one_deadline[Role.BOB]",
        (
            "    line.deadline = time.monotonic() + HANDSHAKE_SECONDS\n    offer",
            "    offer",
        ),
    ),
    weak(
        "Alice's handshake without a deadline",
        ATTACKS + "the_handshake_has_one_deadline[Role.ALICE]",
        ("    line.deadline = time.monotonic() + HANDSHAKE_SECONDS\n    hello", "    hello"),
    ),
    weak(
        "a time-out for every read",
        ATTACKS + "the_handshake_has_one_deadline[Role.BOB]",
        ("math.inf, self.deadline - time.monotonic()", "math.inf, 10.0"),
    ),
    # ------------------------------------------------- the handshake's order, and trust
    weak(
        "Bob's READY before he opened Alice's",
        ATTACKS + "bob_signs_nothing_before_he_opened_alices_ready",
        ('    his = sealer.seal(Kind.READY, "", opener.latest)\n    line.send(his)\n', ""),
        (
            "agree(bytes(line.receive(HELLO_LIMIT)))",
            "agree(bytes(line.receive(HELLO_LIMIT)))\n    his = sealer.seal(Kind.READY)\n    line.send(his)",
        ),
    ),
    weak(
        "Bob does not open Alice's READY",
        ATTACKS + "a_key_is_pinned_only_after_its_owner_has_proven_to_hold_it",
        ("opener.open_in_order(hers, sealer)", "opener._next = 1"),
    ),
    weak(
        "Alice does not open Bob's READY",
        ATTACKS + "alice_neither_pins_nor_speaks_before_she_opened_bobs_ready",
        ("opener.open_in_order(his, sealer)", "opener._next = 1"),
    ),
    weak(
        "Bob pins before he opened READY",
        ATTACKS + "a_key_is_pinned_only_after_its_owner_has_proven_to_hold_it",
        ("peer.check(opener.signer)\n    hers = bytes", "peer.pin(opener.signer)\n    hers = bytes"),
    ),
    weak(
        "Alice pins before she opened READY",
        ATTACKS + "a_key_is_pinned_only_after_its_owner_has_proven_to_hold_it",
        ("peer.check(opener.signer)\n    hers = sealer", "peer.pin(opener.signer)\n    hers = sealer"),
    ),
    weak(
        "Alice signs before she checked the pin",
        ATTACKS + "man_in_the_middle_with_his_own_key_is_refused_by_the_pin[Role.BOB]",
        ("    peer.check(opener.signer)\n    hers = sealer", "    hers = sealer"),
    ),
    weak(
        "pin",
        ATTACKS + "man_in_the_middle_with_his_own_key_is_refused_by_the_pin[Role.ALICE]",
        ("if pinned and ssh_line(key) not in", "if False and ssh_line(key) not in"),
    ),
    weak(
        "pin not checked again",
        FILES + "a_key_pinned_by_somebody_else_after_the_check_is_found",
        ("            self.check(key)\n", ""),
    ),
    weak(
        "nothing pinned",
        FILES + "the_first_key_is_pinned_and_then_accepted_in_silence",
        ("self.home.write(Home.KNOWN_PEERS, text.encode())", "pass"),
    ),
    weak(
        "a new key takes the place of the pinned one",
        FILES + "another_key_is_refused_and_the_refusal_says_what_to_do",
        ("if pinned and ssh_line(key) not in", "if False and ssh_line(key) not in"),
        ("if self.only is not None and any(", "if any("),
    ),
    weak(
        "one of several pins lost",
        FILES + "each_of_several_pinned_keys_is_accepted",
        ("if self.only is None and wanted in", "if False and wanted in"),
        ("if self.only is not None and any(", "if any("),
    ),
    weak(
        "the pin of another name",
        FILES + "the_first_key_is_pinned_and_then_accepted_in_silence",
        ("line.split()[:1] == [self.name]", "line.startswith(self.name)"),
    ),
    weak(
        "--peer not compared",
        ATTACKS + "man_in_the_middle_at_first_contact_is_refused_by_the_fingerprint[Role.BOB]",
        ("if not hmac.compare_digest(presented, self.only):", "if False:"),
    ),
    weak(
        "--peer leaves the old pin",
        FILES + "the_key_asked_for_takes_the_place_of_the_old_ones",
        ("line for line in lines if line not in mine", "line for line in lines"),
    ),
    weak(
        "Bob's --peer ignored",
        ATTACKS + "the_option_peer_accepts_no_other_key[bob_server.py]",
        ('"alice", options.peer', '"alice", None'),
        file=BOB,
    ),
    weak(
        "Alice's --peer ignored",
        ATTACKS + "the_option_peer_accepts_no_other_key[alice_client.py]",
        ('{options.port}", options.peer', '{options.port}", None'),
        file=ALICE,
    ),
    weak(
        "any Alice takes over",
        PROGRAMS + "a_second_alice_is_told_that_bob_is_busy",
        ("self._current.peer_key == channel.peer_key", "True"),
        file=BOB,
    ),
    # ------------------------------------------------- what a transcript proves
    weak(
        "a transcript's order",
        TRANSCRIPT + "changed[reply before request]",
        ("opener.open_in_order(payload, other)", "opener.open(payload)"),
    ),
    unchecked("a conversation twice", TRANSCRIPT + "one_conversation_is_not_two", "agreement.th not in seen"),
    unchecked(
        "a transcript without both READY",
        TRANSCRIPT + "whoever_is_asked_for_has_to_have_signed",
        "opener.number == 0 or other.number > 0",
    ),
    weak(
        "a goodbye after the peer's",
        TRANSCRIPT + "nothing_follows_the_peers_goodbye",
        ("            self._sealer.end()\n        if self._tr", "            pass\n        if self._tr"),
    ),
    weak(
        "a goodbye that names what is not in the file",
        TRANSCRIPT + "a_goodbye_names_the_last_record_that_is_in_the_file",
        ("seal(kind, text, self._received)", "seal(kind, text, self._opener.latest)"),
    ),
    weak(
        "half an entry",
        TRANSCRIPT + "a_full_disk_leaves_whole_entries_and_no_goodbye_that_looks_like_an_attack",
        ("file.truncate(whole.st_size)", "pass"),
    ),
    unchecked(
        "one key on both sides of a transcript",
        TRANSCRIPT + "changed[one key on both sides]",
        "bob.rsa != alice.rsa",
    ),
    weak(
        "C that commits to nothing",
        TRANSCRIPT + "the_commitment_refuses_a_record_that_opens_to_two_texts",
        ("th + keys.commitment", "th + bytes(32)"),
    ),
    # ------------------------------------------------- files
    weak(
        "identity readable by others",
        FILES + "home_is_private_whatever_the_umask[0o0]",
        ("NO_TRICKS, 0o600)", "NO_TRICKS, 0o644)"),
    ),
    weak(
        "folder readable by others",
        FILES + "home_is_private_whatever_the_umask[0o22]",
        ("mkdir(mode=0o700", "mkdir(mode=0o755"),
    ),
    weak(
        "symbolic links followed",
        FILES + "what_is_no_file_of_ones_own_is_refused[link-identity.pem]",
        ("flags | NO_TRICKS", "flags"),
    ),
    weak(
        "owner",
        ATTACKS + "files_of_another_user_are_refused_whoever_that_is[1]",
        ("if info.st_uid != os.geteuid():", "if False:"),
    ),
    weak(
        "mode",
        FILES + "what_is_no_file_of_ones_own_is_refused[all_write-known_peers]",
        ("if info.st_mode & forbidden:", "if False:"),
    ),
    weak(
        "mode of the folder",
        FILES + "home_is_refused_when_others_can_write_to_it[0o777]",
        ("_check_owner(folder, folder.stat(), 0o022)", "pass"),
    ),
    weak(
        "identity that others can read",
        FILES + "only_the_identity_must_not_be_readable[0o644]",
        ("forbidden=0o077", "forbidden=0o022"),
    ),
    # ------------------------------------------------- what is shown
    weak(
        "controls as they are",
        PRIMITIVES + "what_could_drive_a_terminal_is_shown_escaped[secret\\rBob: yes-secret\\\\rBob: yes]",
        ('m[0].encode("unicode_escape").decode()', "m[0]"),
    ),
    *(
        weak(f"{what} of {who}", ATTACKS + SCREEN + f"[{who}]", edit, file=f"{who}.py")
        for who in ("bob_server", "alice_client")
        for what, edit in (
            (
                "what the peer says, unescaped, on the screen",
                ("chat.screen_lines(text, columns)", 'text.split("\\n")'),
            ),
            (
                "what the program says, unescaped, on the screen",
                ("chat.screen_lines(str(text))", "[str(text)]"),
            ),
            ("no bar, on the screen", ("{'|':>{len(mark) - 1}} ", "")),
        )
    ),
    weak(
        "cut reported as success",
        PROGRAMS + "a_killed_program_is_told_from_a_goodbye[bob]",
        ('("Cut off", 1)', '("Cut off", 0)'),
        file=ALICE,
    ),
]


def run(folder: Path, *tests: str) -> subprocess.CompletedProcess[str]:
    """Run tests without coverage, and without any plugin but the time-out: that is sooner done."""
    command = [sys.executable, "-m", "pytest", "-q", "-x", "-p", "pytest_timeout", "-p", "no:cacheprovider"]
    inherited = {name: value for name, value in os.environ.items() if not name.startswith(("COV", "PYTEST"))}
    return subprocess.run(
        [*command, *tests],
        cwd=folder,
        env={"TEST_DEADLINE": "10", **inherited, "PYTEST_DISABLE_PLUGIN_AUTOLOAD": "1"},
        stdin=subprocess.DEVNULL,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        timeout=SECONDS,
        check=False,
    )


@pytest.fixture
def copy(tmp_path: Path, keys: Keys) -> Path:
    """Return a copy of the programs and their tests, which takes the keys that there are and makes none."""
    folder = tmp_path / "copy"
    folder.mkdir()
    for name in COPIED:
        if (ROOT / name).is_dir():
            shutil.copytree(ROOT / name, folder / name, ignore=shutil.ignore_patterns("__pycache__"))
        else:
            shutil.copy(ROOT / name, folder / name)
    made = [key.export_key() for key in keys]
    with (folder / "tests" / "conftest.py").open("a") as conftest:
        conftest.write(
            "@pytest.fixture(scope='session')\n"
            f"def keys(): return Keys(*map(chat.RSA.import_key, {made!r}))\n"
        )
    return folder


@pytest.mark.parametrize("weakening", WEAKENINGS, ids=lambda weakening: weakening.name)
def test_the_test_meant_for_it_goes_red(copy: Path, weakening: Weakening) -> None:
    path = copy / weakening.file
    text = path.read_text(encoding="utf-8")
    for old, new in weakening.edits:
        assert text.count(old) == 1, f"occurs {text.count(old)} times: {old}"
        text = text.replace(old, new)
    compile(text, weakening.file, "exec")
    path.write_text(text, encoding="utf-8")
    done = run(copy, weakening.test)
    if done.returncode == TESTS_PASSED and " skipped" in done.stdout:
        pytest.skip(f"the test meant for it cannot run here: {done.stdout}")
    assert done.returncode == TESTS_FAILED, done.stdout


def test_without_a_weakening_all_of_them_are_green(copy: Path) -> None:
    done = run(copy, *dict.fromkeys(weakening.test for weakening in WEAKENINGS))
    assert done.returncode == TESTS_PASSED, done.stdout


def test_the_list_is_as_long_as_it_should_be() -> None:
    assert len(WEAKENINGS) >= 45
    assert len({weakening.name for weakening in WEAKENINGS}) == len(WEAKENINGS)
