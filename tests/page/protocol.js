// secure-chat/1, read by a browser: the frames of a conversation are taken apart, checked and opened.
//
// This is written from the section "Protocol" of README.md. It uses the browser's own SHA-256, AES-GCM and RSA-PSS
// (crypto.subtle), and BigInt for the numbers. Nothing here touches the page: bytes go in, and a description of what
// was found comes out. It goes on after a check has failed, to find out what the next one would have said.

const VERSION = 'secure-chat/1';
const HELLO_LIMIT = 8192;
const READY_LIMIT = 4096;
const RECORD_LIMIT = 1049372;
const TEXT_LIMIT = 1048576;
const TYPES = ['READY', 'TEXT', 'CLOSE'];
const NAME = { bob: 'Bob', alice: 'Alice' };
const OTHER = { bob: 'alice', alice: 'bob' };
const DIRECTION = { bob: 'bob->alice', alice: 'alice->bob' }; // by who sends
const NOTHING = new Uint8Array(32); // what Alice's READY replies to

// ---- Bytes and numbers. Numbers are unsigned and big-endian.

const ascii = (text) => new TextEncoder().encode(text);
const toHex = (bytes) => Array.from(bytes, (byte) => byte.toString(16).padStart(2, '0')).join('');
const fromHex = (hex) => Uint8Array.from(hex.match(/../g) ?? [], (pair) => parseInt(pair, 16));
const toNumber = (bytes) => BigInt('0x0' + toHex(bytes));
const bitLength = (number) => (number ? number.toString(2).length : 0);
const fromBase64 = (text) => Uint8Array.from(atob(text), (character) => character.charCodeAt(0));
const same = (a, b) => a.length === b.length && a.every((byte, i) => byte === b[i]);

function join(...parts) {
  const whole = new Uint8Array(parts.reduce((sum, part) => sum + part.length, 0));
  let at = 0;
  for (const part of parts) {
    whole.set(part, at);
    at += part.length;
  }
  return whole;
}

/** A number in so many bytes. */
function uint(size, number) {
  return fromHex(number.toString(16).padStart(2 * size, '0'));
}

/** The number in these few bytes. */
function readUint(bytes) {
  return bytes.reduce((number, byte) => number * 256 + byte, 0);
}

const sha256 = async (...parts) => new Uint8Array(await crypto.subtle.digest('SHA-256', join(...parts)));

/** base^exponent mod modulus, by squaring and multiplying. */
function power(base, exponent, modulus) {
  let result = 1n;
  for (const bit of exponent.toString(2)) {
    result = (result * result) % modulus;
    if (bit === '1') result = (result * base) % modulus;
  }
  return result;
}

/** The Jacobi symbol of a over n, which is odd. Modulo a prime, it is 1 for squares. */
function jacobi(a, n) {
  let symbol = 1;
  a %= n;
  while (a) {
    while (!(a & 1n)) {
      a >>= 1n;
      if ((n & 7n) === 3n || (n & 7n) === 5n) symbol = -symbol;
    }
    if ((a & 3n) === 3n && (n & 3n) === 3n) symbol = -symbol;
    [a, n] = [n % a, a];
  }
  return n === 1n ? symbol : 0;
}

/** y is in the subgroup of order q, and is not 1. */
const inSubgroup = (y, p) => Boolean(p & 1n) && y >= 2n && y <= p - 2n && jacobi(y, p) === 1;

/**
 * The cheap part of the test of p: p mod 3, 4^q = 1 mod p, and one round of Miller-Rabin for q, to base 2. The program
 * makes 64 rounds, each with a base drawn at random. A p that was made to deceive could pass this one.
 */
function looksLikeSafePrime(p) {
  if (looksLikeSafePrime.known.has(p)) return looksLikeSafePrime.known.get(p);
  const q = (p - 1n) / 2n;
  let odd = q - 1n;
  let halvings = 0;
  for (; odd && !(odd & 1n); odd >>= 1n) halvings += 1;
  let passed = Boolean(p & q & 1n) && p % 3n !== 0n && power(4n, q, p) === 1n;
  if (passed) {
    let x = power(2n, odd, q);
    passed = x === 1n || x === q - 1n;
    for (let i = 1; i < halvings && !passed; i += 1) {
      x = (x * x) % q;
      passed = x === q - 1n;
    }
  }
  looksLikeSafePrime.known.set(p, passed);
  return passed;
}
looksLikeSafePrime.known = new Map();

// ---- A transcript file: a sequence of frames, each a tag and what it marks.

const PLACES = [['b', HELLO_LIMIT], ['a', HELLO_LIMIT], ['z', 512], ['A', READY_LIMIT], ['B', READY_LIMIT]];
const BAD_ORDER = 'a transcript begins with both hellos, Z and both READY';
const CUT_SHORT = 'the transcript ends in the middle of an entry';
const UNKNOWN = 'an entry is of no known kind, or not where it belongs';

/**
 * Take a file apart. Each entry has its tag, its bytes as on the wire (length and payload), and where the payload
 * stands in the file. `fault` says why the file cannot be read further, if it cannot.
 */
function splitFile(file) {
  const entries = [];
  let at = 0;
  while (entries.length < PLACES.length || at < file.length) {
    const [place, limit] = PLACES[entries.length] ?? [null, RECORD_LIMIT];
    const header = file.subarray(at, at + 5);
    const tag = header.length === 5 ? String.fromCharCode(header[4]) : '';
    if (place && tag !== place) {
      return { entries, fault: entries.length ? BAD_ORDER : 'this is no transcript of secure-chat' };
    }
    if (!place && header.length < 5 && !same(header, NOTHING.subarray(0, 4))) return { entries, fault: CUT_SHORT };
    if (!place && tag !== 'A' && tag !== 'B') return { entries, fault: UNKNOWN };
    const length = readUint(header.subarray(0, 4)) - 1; // without the tag
    if (length > limit) return { entries, fault: `an entry of ${length} bytes, over the limit of ${limit}` };
    const payload = file.subarray(at + 5, at + 5 + Math.max(length, 0));
    if (payload.length !== length) return { entries, fault: CUT_SHORT };
    entries.push({ tag, wire: join(uint(4, length), payload), offset: at + 5 });
    at += 5 + length;
  }
  return { entries, fault: null };
}

// ---- An RSA key: DER, in its one canonical encoding.

const RSA_ENCRYPTION = fromHex('300d06092a864886f70d0101010500'); // rsaEncryption, NULL

/** Read one DER element with this tag. `exact` turns false where a length is not in its shortest form. */
function readElement(der, at, end, tag) {
  let length = der[at + 1];
  let start = at + 2;
  let exact = true;
  if (length >= 0x80) {
    const size = length & 0x7f;
    if (size < 1 || size > 4) return null;
    length = readUint(der.subarray(start, start + size));
    exact = length >= 0x80 && der[start] !== 0;
    start += size;
  }
  if (der[at] !== tag || !(start + length <= end)) return null;
  return { start, end: start + length, exact };
}

/** Take an RSA key apart. Every result has `parts`, the places of n and e, or `fault`. */
function readRsaKey(der) {
  if (der.length > 1024) return { fault: 'rsa size of DER' };
  const head = Array.from({ length: 5 }, (_, at) => der.subarray(at, at + RSA_ENCRYPTION.length));
  if (!head.some((part) => same(part, RSA_ENCRYPTION))) return { fault: 'rsa type' };
  const damaged = { fault: 'rsa parse' };
  const whole = readElement(der, 0, der.length, 0x30);
  if (!whole || whole.end !== der.length) return damaged;
  const kind = der.subarray(whole.start, whole.start + RSA_ENCRYPTION.length);
  if (!same(kind, RSA_ENCRYPTION)) return damaged;
  const bits = readElement(der, whole.start + RSA_ENCRYPTION.length, whole.end, 0x03);
  if (!bits || bits.end !== whole.end || der[bits.start] !== 0) return damaged;
  const pair = readElement(der, bits.start + 1, bits.end, 0x30);
  const n = pair && pair.end === bits.end && readElement(der, pair.start, pair.end, 0x02);
  const e = n && readElement(der, n.end, pair.end, 0x02);
  if (!e || e.end !== pair.end || n.start === n.end || e.start === e.end) return damaged;
  if (der[n.start] & 0x80 || der[e.start] & 0x80) return damaged; // negative numbers
  const shortest = [n, e].every(({ start, end }) => end - start === 1 || der[start] || der[start + 1] & 0x80);
  const key = { n: toNumber(der.subarray(n.start, n.end)), e: toNumber(der.subarray(e.start, e.end)) };
  key.parts = { n: [n.start, n.end], e: [e.start, e.end] };
  key.bits = bitLength(key.n);
  key.size = Math.ceil(key.bits / 8);
  if (!(key.n & 1n) || (key.e && key.n % key.e === 0n)) key.fault = 'rsa parse';
  else if (key.bits < 2048 || key.bits > 4096) key.fault = 'rsa bits';
  else if (key.e !== 65537n) key.fault = 'rsa exponent';
  else if (![whole, bits, pair, n, e].every(({ exact }) => exact) || !shortest) key.fault = 'rsa encoding';
  return key;
}

/** What OpenSSH shows of a key: SHA-256 over "ssh-rsa", e and n, each with its length before it. */
function sshBlob(key) {
  const number = (value) => {
    const hex = value.toString(16);
    const bytes = fromHex(hex.length % 2 ? '0' + hex : hex);
    return bytes[0] & 0x80 ? join([0], bytes) : bytes;
  };
  return join(...[ascii('ssh-rsa'), number(key.e), number(key.n)].flatMap((part) => [uint(4, part.length), part]));
}

async function fingerprint(key) {
  const hash = await sha256(sshBlob(key));
  return 'SHA256:' + btoa(String.fromCharCode(...hash)).replace(/=+$/, '');
}

/** Whether a signature is valid: RSASSA-PSS with SHA-256, MGF1 with SHA-256, and a salt of 32 bytes. */
async function verifySignature(key, signed, signature) {
  if (!key.imported) {
    const algorithm = { name: 'RSA-PSS', hash: 'SHA-256' };
    key.imported = crypto.subtle.importKey('spki', key.der, algorithm, false, ['verify']);
  }
  try {
    return await crypto.subtle.verify({ name: 'RSA-PSS', saltLength: 32 }, await key.imported, signature, signed);
  } catch {
    return false;
  }
}

// ---- AES-256-GCM, and what is left of it when nobody looks at the tag.

async function decrypt(key, nonce, ciphertext, tag) {
  const aes = await crypto.subtle.importKey('raw', key, 'AES-GCM', false, ['decrypt']);
  try {
    return new Uint8Array(await crypto.subtle.decrypt({ name: 'AES-GCM', iv: nonce }, aes, join(ciphertext, tag)));
  } catch {
    return null;
  }
}

/** Without its tag, GCM is counter mode: a key stream is added bit by bit. The counter begins at 2 (1 is the tag's). */
async function decryptWithoutTag(key, nonce, ciphertext) {
  const aes = await crypto.subtle.importKey('raw', key, 'AES-CTR', false, ['decrypt']);
  const counter = join(nonce, uint(4, 2));
  return new Uint8Array(await crypto.subtle.decrypt({ name: 'AES-CTR', counter, length: 32 }, aes, ciphertext));
}

// ---- The six words: RFC 1751.

/** Six words for 8 bytes, from the list of 2048. */
function makeWords(bytes, list) {
  const number = toNumber(bytes);
  let parity = 0n;
  for (let rest = number; rest; rest >>= 2n) parity += rest & 3n;
  const bits = (number << 2n) | (parity & 3n); // 66 bits
  return [55n, 44n, 33n, 22n, 11n, 0n].map((shift) => list[Number((bits >> shift) & 2047n)].toLowerCase());
}

// ---- The whole conversation.

/**
 * Read the entries of a conversation. The result has `frames` (each with its fields, its checks and what was found),
 * `refusals` (in the order in which they would be met; the first one ends the conversation), and what both sides share.
 */
class Reading {
  constructor(words) {
    this.wordList = words;
    this.frames = [];
    this.refusals = [];
    this.messages = [];
    this.closed = false;
  }

  static async of({ entries, fault = null }, words = [], progress = () => {}) {
    const reading = new Reading(words);
    const tooShort = fault && entries.length < 3; // a reader takes both hellos and Z before it looks at them
    if (tooShort) reading.refuse(null, { id: 'file', words: fault });
    for (const entry of entries) {
      await reading.take(entry, entries);
      if (reading.frames.length % 50 === 0) await progress(reading.frames.length);
    }
    if (fault && !tooShort && !reading.closed) reading.refuse(null, { id: 'file', words: fault });
    if (fault && reading.closed) reading.refuse(null, { id: 'after CLOSE', words: 'something follows the goodbye' });
    return reading;
  }

  get refused() {
    return this.refusals[0] ?? null;
  }

  refuse(frame, check) {
    this.refusals.push({ frame, check, by: frame ? frame.receiver : null, words: check.words });
  }

  /** Note a check. Where an earlier one has failed already, this one says what it would have said. */
  check(frame, id, passed, words, note = '') {
    const check = { id, passed: Boolean(passed), reached: !this.refused, words, note };
    frame.checks.push(check);
    if (!passed) this.refuse(frame, check);
    return check.passed;
  }

  async take(entry, entries) {
    const index = this.frames.length;
    const place = PLACES[index];
    const sender = { b: 'bob', B: 'bob', a: 'alice', A: 'alice', z: null }[entry.tag];
    const frame = { entry, index, sender, receiver: OTHER[sender] ?? null, fields: [], checks: [], values: [] };
    frame.announced = readUint(entry.wire.subarray(0, 4));
    frame.payload = entry.wire.subarray(4);
    this.frames.push(frame);
    if (this.closed) this.check(frame, 'after CLOSE', false, 'something follows the goodbye');
    if (place && place[0] !== entry.tag) this.check(frame, 'file', false, BAD_ORDER);
    if (entry.tag === 'z') return this.takeZ(frame);
    const limit = place ? place[1] : RECORD_LIMIT;
    const over = `a frame of ${frame.announced} bytes, over the limit of ${limit}: is this secure-chat?`;
    if (this.check(frame, 'limit', frame.announced <= limit, over)) this.settleLength(frame, entries);
    if (entry.tag === 'b' || entry.tag === 'a') return this.takeHello(frame);
    return this.takeRecord(frame);
  }

  /** Somebody may have changed a length: then the frame ends early, or takes in what comes next from its sender. */
  settleLength(frame, entries) {
    let stream = frame.payload;
    for (let i = frame.index + 1; i < entries.length && stream.length < frame.announced; i += 1) {
      const { tag, wire } = entries[i];
      if (tag === 'z') continue; // not on the wire
      if (tag.toLowerCase() !== frame.entry.tag.toLowerCase()) break; // the other side's turn: nothing more comes
      stream = join(stream, wire);
    }
    const missing = frame.announced - stream.length;
    if (missing > 0) this.check(frame, 'cut', false, `the other side did not answer in time`);
    frame.payload = stream.subarray(0, frame.announced);
  }

  // ---- Hellos

  async takeHello(frame) {
    const { payload, sender } = frame;
    const bobs = sender === 'bob';
    frame.kind = 'hello';
    frame.title = `${NAME[sender]}'s hello`;
    const spans = [];
    let at = 0;
    while (at < payload.length) {
      const end = at + 2 + readUint(payload.subarray(at, at + 2));
      if (end > payload.length) break;
      spans.push([at, end]);
      at = end;
    }
    const names = bobs ? ['version', 'nonce_B', 'p', 'g', 'B', 'RSA key'] : ['version', 'nonce_A', 'A', 'RSA key'];
    frame.fields = [{ name: 'length', start: 0, end: 4 }];
    spans.forEach(([start, end], i) => {
      frame.fields.push({ name: names[i] ?? 'unknown', start: 4 + start, end: 4 + end, lead: 2 });
    });
    if (4 + at < frame.entry.wire.length) {
      frame.fields.push({ name: 'rest', start: 4 + at, end: frame.entry.wire.length });
    }
    const fields = spans.map(([start, end]) => payload.subarray(start + 2, end));

    const whole = this.check(frame, 'fields', at === payload.length, 'a field of the hello is cut short');
    const version = fields.length > 0 && same(fields[0], ascii(VERSION));
    this.check(frame, 'version', version, `the other side does not speak ${VERSION}`);
    const count = fields.length === names.length;
    this.check(frame, 'field count', count, 'the hello has too many or too few fields');
    if (!whole || !count) return;
    const [nonce, value, der] = [fields[1], ...fields.slice(-2)];
    const numbers = bobs ? fields.slice(2, 4) : [];
    this.check(frame, 'nonce length', nonce.length === 32, 'the nonce is not 32 bytes long');
    if (bobs) {
      const short = numbers.every((number) => number.length <= 512);
      if (!this.check(frame, 'integer length', short, 'p or g is over 4096 bits long')) return;
      const minimal = numbers.every((number) => number[0] !== 0);
      this.check(frame, 'integer encoding', minimal, 'p or g is not in its minimal encoding');
      this.checkGroup(frame, ...numbers.map(toNumber));
    }
    const hello = { nonce, value, der, frame };
    this.checkRsaKey(frame, hello);
    this.checkValue(frame, value);
    if (bobs) this.bob = hello;
    else {
      const differs = !this.bob || !same(der, this.bob.der);
      this.check(frame, 'own key', differs, 'both sides present the same key: a reflection');
      this.alice = hello;
    }
    if (hello.key) hello.fingerprint = await fingerprint(hello.key);
    if (this.bob && !bobs) this.th = await sha256(this.bob.frame.entry.wire, frame.entry.wire);
  }

  checkGroup(frame, p, g) {
    this.p = p;
    this.g = g;
    const bits = bitLength(p);
    if (!this.check(frame, 'p size', bits >= 2048 && bits <= 4096, `p has ${bits} bits, not 2048 to 4096`)) return;
    this.check(frame, 'p even', p & 1n, 'p is even');
    this.check(frame, 'p safe prime', looksLikeSafePrime(p), 'p is not a safe prime');
    this.check(frame, 'g subgroup', inSubgroup(g, p), 'g does not generate the subgroup of order q');
  }

  checkRsaKey(frame, hello) {
    const key = readRsaKey(hello.der);
    const order = ['rsa size of DER', 'rsa type', 'rsa parse', 'rsa bits', 'rsa exponent', 'rsa encoding'];
    const words = {
      'rsa size of DER': 'the RSA key is larger than 1 KiB',
      'rsa type': 'the key is not an RSA SubjectPublicKeyInfo',
      'rsa parse': 'the RSA key cannot be parsed',
      'rsa bits': `the RSA key has ${key.bits} bits, not 2048 to 4096`,
      'rsa exponent': "the RSA key's public exponent is not 65537",
      'rsa encoding': 'the RSA key is not in its canonical encoding',
    };
    for (const id of order) {
      if (!this.check(frame, id, key.fault !== id, words[id])) break; // what it is beyond that, nobody can say
    }
    if (!key.parts) return;
    const field = frame.fields.at(-1);
    const start = field.start + 2;
    field.parts = [
      ['modulus n', start + key.parts.n[0], start + key.parts.n[1]],
      ['exponent e', start + key.parts.e[0], start + key.parts.e[1]],
    ];
    key.der = hello.der;
    hello.key = key;
  }

  checkValue(frame, value) {
    if (!this.p) return;
    const length = Math.ceil(bitLength(this.p) / 8);
    this.check(frame, 'public value length', value.length === length, 'the public value is not as long as p');
    const fits = inSubgroup(toNumber(value), this.p);
    this.check(frame, 'public value subgroup', fits, 'the public value is not in the subgroup of order q');
  }

  // ---- Z, and what comes of it

  async takeZ(frame) {
    Object.assign(frame, { kind: 'z', title: 'The shared secret Z', payload: frame.entry.wire.subarray(4) });
    frame.fields = [{ name: 'Z', start: 4, end: frame.entry.wire.length }];
    this.zFrame = frame;
    this.z = frame.payload;
    if (!this.bob || !this.alice) return;
    this.check(frame, 'z length', this.z.length === this.bob.value.length, 'Z is not as long as p');
    this.lanes = {};
    for (const sender of ['alice', 'bob']) {
      const fixed = join(ascii(`${VERSION} key ${DIRECTION[sender]}`), this.th);
      const [key, commitment] = await Promise.all([1, 2].map((block) => sha256(uint(4, block), this.z, fixed)));
      const { key: signer } = this[sender];
      // `latest` and `before` are the hashes that were signed of the last two records.
      this.lanes[sender] = { sender, key, commitment, signer, number: 0, latest: null, before: null };
    }
  }

  // ---- Records

  async takeRecord(frame) {
    const { payload, sender } = frame;
    frame.kind = 'record';
    frame.title = `${NAME[sender]}'s record`;
    frame.fields = [
      { name: 'length', start: 0, end: 4 },
      { name: 'payload', start: 4, end: frame.entry.wire.length },
    ];
    const lane = this.lanes?.[sender];
    if (!lane || !lane.signer) return;
    const other = this.lanes[OTHER[sender]];
    const number = lane.number;
    frame.number = number;
    frame.title = `${NAME[sender]}'s record ${number}`;

    const split = payload.length - lane.signer.size; // where the signature begins
    const padded = split - 12 - 16;
    const possible = padded >= 256 && padded % 256 === 0;
    if (!this.check(frame, 'record length', possible, 'the record has an impossible length')) return;
    const spans = { nonce: [0, 12], ciphertext: [12, split - 16], tag: [split - 16, split] };
    spans.signature = [split, payload.length];
    const [nonce, ciphertext, tag, signature] = Object.values(spans).map((span) => payload.subarray(...span));
    frame.fields = [frame.fields[0]];
    for (const [name, [start, end]] of Object.entries(spans)) {
      frame.fields.push({ name, start: 4 + start, end: 4 + end });
    }
    const rest = 4 + payload.length;
    if (rest < frame.entry.wire.length) {
      frame.fields.push({ name: 'rest', start: rest, end: frame.entry.wire.length });
    }

    const expected = uint(12, number);
    const told = `record ${toNumber(nonce)} where record ${number} should be: replayed, dropped or reordered`;
    this.check(frame, 'number', same(nonce, expected), told);
    // Direction, th, C and the number come from the receiver's own state, never from the record.
    const context = join(ascii(`${VERSION} signature ${DIRECTION[sender]}`), this.th, lane.commitment);
    const opened = await this.open(frame, lane, context, expected, ciphertext, tag, signature);
    const { signed, plaintext, digest } = opened;
    Object.assign(frame, { signed, plaintext, digest, nonce, ciphertext, recordTag: tag, signature, context });
    this.check(frame, 'signature', opened.valid, "the record's signature is not valid");
    this.check(frame, 'tag', opened.authentic, "the record's authentication tag is not valid");
    await this.look(frame, lane, other);
    Object.assign(lane, { latest: signed, before: lane.latest, number: number + 1, latestFrame: frame });
  }

  /** The slow part. What was computed once is remembered with the entry, while nothing that goes into it changes. */
  async open({ entry, payload }, lane, context, nonce, ciphertext, tag, signature) {
    const inputs = toHex(join(context, nonce, lane.key)) + lane.signer.n.toString(16);
    if (entry.opened?.inputs === inputs && same(entry.opened.payload, payload)) return entry.opened;
    const text = join(context, nonce, ciphertext, tag);
    const [signed, valid, authentic] = await Promise.all([
      sha256(text),
      verifySignature(lane.signer, text, signature),
      decrypt(lane.key, nonce, ciphertext, tag),
    ]);
    const plaintext = authentic ?? (await decryptWithoutTag(lane.key, nonce, ciphertext));
    const digest = await sha256(plaintext);
    entry.opened = { inputs, payload, signed, valid, authentic: authentic !== null, plaintext, digest };
    return entry.opened;
  }

  /** Look inside a record: padding, type, text, turn, and what it replies to. */
  async look(frame, lane, other) {
    const { plaintext, sender, number } = frame;
    let last = plaintext.length - 1;
    while (last > 0 && plaintext[last] === 0) last -= 1;
    const whole = plaintext[last] === 0x80 && last >= plaintext.length - 256;
    this.check(frame, 'padding', whole, "the record's padding is not valid");
    const end = whole ? last : plaintext.length;
    if (!this.check(frame, 'too short', end >= 33, 'the record is too short')) return;
    const type = TYPES[plaintext[0]] ?? 'unknown';
    const inReplyTo = plaintext.subarray(1, 33);
    const body = plaintext.subarray(33, end);
    Object.assign(frame, { type, inReplyTo, body, bodyEnd: end });
    frame.parts = [
      { name: 'type', start: 0, end: 1 },
      { name: 'in_reply_to', start: 1, end: 33 },
      { name: 'body', start: 33, end },
      { name: 'padding', start: end, end: plaintext.length },
    ];
    this.check(frame, 'type', type !== 'unknown', 'the record is of no known type');
    const ready = type === 'READY';
    const busy = type === 'CLOSE' && sender === 'bob'; // which he may say in the place of READY
    this.check(frame, 'ready', ready === (number === 0) || busy, 'READY is record 0, and no other');
    const most = { TEXT: TEXT_LIMIT, CLOSE: 0, READY: sender === 'bob' ? 32 : 0 }[type] ?? TEXT_LIMIT;
    const fits = ready ? body.length === most : body.length <= most;
    this.check(frame, 'body length', fits, "the record's body has a wrong length");
    if (!ready) {
      try {
        frame.text = new TextDecoder('utf-8', { fatal: true, ignoreBOM: true }).decode(body);
      } catch {
        frame.text = new TextDecoder('utf-8', { ignoreBOM: true }).decode(body); // with U+FFFD for what is none
        frame.damaged = true;
      }
      if (type !== 'CLOSE') this.check(frame, 'utf-8', !frame.damaged, "the record's text is not valid UTF-8");
    }
    const inTurn = lane.number - other.number === (sender === 'alice' ? 0 : -1);
    this.check(frame, 'turn', inTurn || type === 'CLOSE', 'the other side spoke out of turn');
    const latest = same(inReplyTo, other.latest ?? NOTHING);
    const crossed = type === 'CLOSE' && inTurn && other.before !== null && same(inReplyTo, other.before);
    const replies = latest || crossed;
    this.check(frame, 'in_reply_to', replies, 'the record replies to another record than the last one');
    frame.crossed = crossed && !latest;
    if (busy && number === 0) this.check(frame, 'file', false, BAD_ORDER); // of which there are no transcripts
    frame.repliesTo = latest ? other.latestFrame : this.frames.findLast((f) => f.signed && same(f.signed, inReplyTo));
    if (ready && sender === 'bob') {
      this.r = body;
      frame.commitment = await sha256(ascii(`${VERSION} commit `), body);
      const kept = same(frame.commitment, this.bob.nonce);
      this.check(frame, 'commitment', kept, "Bob's r does not fit his nonce");
      this.wordsHash = await sha256(ascii(`${VERSION} words `), this.th, body);
      this.words = makeWords(this.wordsHash.subarray(0, 8), this.wordList);
    }
    this.messages.push({ from: sender, type, text: ready ? '' : frame.text, crossed: frame.crossed });
    this.closed ||= type === 'CLOSE';
  }
}
