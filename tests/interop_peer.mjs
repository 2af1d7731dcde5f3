// secure-chat/1 told a second time: both roles of the protocol, its transcripts and its test vectors, written from the
// specification in README.md alone. It is here to show that the specification is enough, and to talk to the programs.
//
//   node interop_peer.mjs bob   --port N [--host ADDR] --key KEY.pem --dh DH.pem [--peer SHA256:...] [--busy]
//   node interop_peer.mjs alice --port N [--host ADDR] --key KEY.pem [--peer SHA256:...]
//      both: [--transcript FILE]; --busy: CLOSE in the place of READY
//   node interop_peer.mjs verify FILE
//   node interop_peer.mjs vectors FILE...
//
// Standard input: a JSON string a line, each a message; its end is a goodbye. Standard output: a JSON event a line.
// Exit status: 0 a goodbye, or all is well; 1 the connection was cut, Bob is busy, or a vector differs; 2 usage;
// 3 a check failed.
//
// This is test code. BigInt is not constant-time, and secrets are not wiped. Without --peer, the first key met is
// taken, and all six words are told at once.

import crypto from 'node:crypto';
import { once } from 'node:events';
import fs from 'node:fs';
import net from 'node:net';
import path from 'node:path';
import { setTimeout as sleep } from 'node:timers/promises';
import { parseArgs, promisify } from 'node:util';

const VERSION = 'secure-chat/1';
const HELLO_LIMIT = 8192;
const RECORD_0_LIMIT = 4096;
const RECORD_LIMIT = 1049372;
const TEXT_LIMIT = 1048576;
const BLOCK = 256;
const PIECE = 16384; // of a long send; both frames of a handshake fit into one
const KINDS = ['READY', 'TEXT', 'CLOSE'];
const [READY, TEXT, CLOSE] = KINDS.keys();
const OTHER = { alice: 'bob', bob: 'alice' };
const DIRECTION = { alice: 'alice->bob', bob: 'bob->alice' }; // by sender
const NONE = Buffer.alloc(32); // the `in_reply_to` of one who has received nothing

class Refused extends Error {
  constructor(check, why) {
    super(why);
    this.check = check;
  }
}
class Cut extends Error {}
class Usage extends Error {}

function check(passed, name, why) {
  if (!passed) throw new Refused(name, why);
}

// ---- Bytes and numbers: unsigned, big-endian

const bytes = (...parts) => Buffer.concat(parts.map((part) => Buffer.from(part)));
const sha256 = (...parts) => crypto.createHash('sha256').update(bytes(...parts)).digest();
const toInteger = (buffer) => BigInt(`0x0${buffer.toString('hex')}`);
const bitLength = (n) => (n ? n.toString(2).length : 0);
const leftPad = (buffer, length) => bytes(Buffer.alloc(length - buffer.length), buffer);

function uint(size, value) {
  const buffer = Buffer.alloc(size);
  buffer.writeUIntBE(value, 0, size);
  return buffer;
}

function power(base, exponent, modulus) {
  let result = 1n;
  for (; exponent; exponent >>= 1n, base = (base * base) % modulus) {
    if (exponent & 1n) result = (result * base) % modulus;
  }
  return result;
}

/** The Jacobi symbol of n over m, which is odd. */
function jacobi(n, m) {
  let symbol = 1;
  for (n %= m; n; [n, m] = [m % n, n]) {
    for (; !(n & 1n); n >>= 1n) if ([3n, 5n].includes(m & 7n)) symbol = -symbol;
    if (n & m & 2n) symbol = -symbol; // both are 3 mod 4
  }
  return m === 1n ? symbol : 0;
}

const isSquare = (n, p) => jacobi(n, p) === 1; // so it has order q, or is 1
const isPrime = promisify(crypto.checkPrime);

// ---- Frame: a uint32 length, then so many bytes

const frame = (payload) => bytes(uint(4, payload.length), payload);

/** What is received: a hello, record 0, then records. */
const limitOf = (index) => [HELLO_LIMIT, RECORD_0_LIMIT][index] ?? RECORD_LIMIT;

/** The payloads in a stream of chunks: a socket, or the whole of a file. What comes while `dropping` is dropped. */
async function* frames(chunks, { limit = limitOf, incomplete = (why) => new Cut(why), dropping = () => false } = {}) {
  let [have, index] = [Buffer.alloc(0), 0];
  let timer;
  try {
    for await (const chunk of chunks) {
      clearTimeout(timer);
      have = bytes(have, chunk);
      while (have.length >= 4 && !dropping()) {
        const length = have.readUInt32BE();
        check(length <= limit(index), 'frame length', `${length} bytes announced, the limit is ${limit(index)}`);
        if (have.length < 4 + length) break;
        const payload = have.subarray(4, 4 + length);
        have = have.subarray(4 + length);
        index += 1;
        yield payload;
      }
      if (dropping()) have = Buffer.alloc(0);
      const stalled = new Cut('a frame stalled for 30 seconds');
      if (have.length) timer = setTimeout(() => chunks.destroy(stalled), 30_000);
    }
  } catch (error) {
    throw error instanceof Refused ? error : new Cut(error.message);
  } finally {
    clearTimeout(timer);
  }
  if (have.length) throw incomplete('ends within a frame');
}

async function nextFrame(incoming) {
  const { value, done } = await incoming.next();
  if (done) throw new Cut('ended without a goodbye');
  return value;
}

// ---- Hello: fields, each a uint16 length and so many bytes

function makeHello(sender, own, { nonce = crypto.randomBytes(32), p, g, value }) {
  const fields = sender === 'bob' ? [VERSION, nonce, p, g, value, own.der] : [VERSION, nonce, value, own.der];
  const payload = bytes(...fields.map((field) => bytes(uint(2, field.length), field)));
  return { payload, nonce, key: own.key };
}

/** Check 1: the form. */
function parseHello(payload, sender) {
  check(payload.length <= HELLO_LIMIT, 'frame length', `a hello of ${payload.length} bytes`);
  const fields = [];
  for (let at = 0; at < payload.length; ) {
    const start = at + 2;
    check(start <= payload.length, 'fields', 'ends within the length of a field');
    at = start + payload.readUInt16BE(at);
    check(at <= payload.length, 'fields', 'ends within a field');
    fields.push(payload.subarray(start, at));
  }
  check(fields[0]?.equals(Buffer.from(VERSION)), 'version', `not ${VERSION}`);
  check(fields.length === (sender === 'bob' ? 6 : 4), 'field count', `${fields.length} fields`);
  const [nonce, value, der] = [fields[1], ...fields.slice(-2)];
  const integers = sender === 'bob' ? fields.slice(2, 4) : [];
  const [p, g] = integers;
  check(nonce.length === 32, 'nonce length', `a nonce of ${nonce.length} bytes`);
  check(integers.every(({ length }) => length <= 512), 'integer length', 'p or g has more than 512 bytes');
  check(integers.every(([first]) => first !== 0), 'integer encoding', 'p or g begins with a zero byte');
  return { payload, nonce, p, g, value, der };
}

/** What Bob's nonce is: it binds him to r, which he shows in his READY. */
const commitmentTo = (r) => sha256('secure-chat/1 commit ', r);

/** Check 2, of Bob's hello alone: p = 2q + 1 with p and q prime, and g generates the squares. */
const passedBefore = new Set();
async function checkParameters(p, g) {
  const [bits, q] = [bitLength(p), (p - 1n) / 2n];
  check(bits >= 2048 && bits <= 4096, 'p size', `p has ${bits} bits`);
  check(p & 1n, 'p even', 'p is even');
  if (!passedBefore.has(p)) {
    const proven = (await isPrime(q, { checks: 64 })) && p % 3n && power(4n, q, p) === 1n; // Pocklington's theorem
    check(proven, 'p safe prime', 'p is not a safe prime');
    passedBefore.add(p);
  }
  check(g >= 2n && g <= p - 2n && isSquare(g, p), 'g subgroup', 'g does not generate the subgroup of order q');
}

/** Check 3: the RSA key. (OpenSSL reads what is not quite DER; that it is canonical refuses this.) */
const RSA_ENCRYPTION = Buffer.from('300d06092a864886f70d0101010500', 'hex'); // AlgorithmIdentifier
function checkRsaKey(der) {
  check(der.length <= 1024, 'rsa size of DER', `an RSA key of ${der.length} bytes of DER`);
  check(der.includes(RSA_ENCRYPTION), 'rsa type', 'not a key of type rsaEncryption with NULL parameters');
  let key;
  try {
    key = crypto.createPublicKey({ key: der, format: 'der', type: 'spki' });
  } catch (error) {
    throw new Refused('rsa parse', `not a public key: ${error.message}`);
  }
  check(key.asymmetricKeyType === 'rsa', 'rsa type', `a key of type ${key.asymmetricKeyType}`);
  const n = toInteger(Buffer.from(key.export({ format: 'jwk' }).n, 'base64url'));
  check(der.equals(derOf(key)), 'rsa encoding', 'an RSA key in another than its canonical encoding');
  const { modulusLength: bits, publicExponent } = key.asymmetricKeyDetails;
  check(bits >= 2048 && bits <= 4096, 'rsa bits', `an RSA key of ${bits} bits`);
  check(n % 2n && n % 65537n, 'rsa modulus', 'a modulus that is even, or a multiple of 65537');
  check(publicExponent === 65537n, 'rsa exponent', `e = ${publicExponent}`);
  return key;
}

/** Check 4: the public value. */
function checkPublicValue(value, p) {
  check(value.length === p.length, 'public value length', `a public value of ${value.length} bytes`);
  const [v, modulus] = [toInteger(value), toInteger(p)];
  const inGroup = v >= 2n && v <= modulus - 2n && isSquare(v, modulus);
  check(inGroup, 'public value subgroup', 'a public value outside the subgroup of order q');
}

/** All the checks of a hello. `other` is the other hello's key (DER), `pin` a fingerprint, `group` Bob's, if known. */
async function checkHello(payload, sender, { group, other, pin }) {
  const hello = parseHello(payload, sender);
  if (sender === 'bob') await checkParameters(toInteger(hello.p), toInteger(hello.g));
  hello.key = checkRsaKey(hello.der);
  checkPublicValue(hello.value, (group ?? hello).p);
  hello.fingerprint = fingerprintOf(hello.key);
  check(!other?.equals(hello.der), 'one key', 'both sides present the same RSA key'); // Check 5
  check(!pin || pin === hello.fingerprint, 'pinned key', `${hello.fingerprint} is not ${pin}`);
  return hello;
}

// ---- Keys: one's own, and how they are written down

const derOf = (publicKey) => publicKey.export({ type: 'spki', format: 'der' });

/** OpenSSH's: SHA-256 over string "ssh-rsa", mpint e, mpint n; an mpint has a zero byte before a high bit. */
function fingerprintOf(publicKey) {
  const { e, n } = publicKey.export({ format: 'jwk' });
  const mpint = (text) => {
    const number = Buffer.from(text, 'base64url');
    return number[0] & 0x80 ? bytes([0], number) : number;
  };
  const blob = bytes(...[Buffer.from('ssh-rsa'), mpint(e), mpint(n)].map(frame));
  return `SHA256:${sha256(blob).toString('base64').replace(/=+$/, '')}`;
}

function readPrivateKey(pem) {
  const privateKey = crypto.createPrivateKey(pem);
  const key = crypto.createPublicKey(privateKey);
  return { privateKey, key, der: derOf(key), sign: (message) => pssSign(message, privateKey) };
}

/** PKCS#3: SEQUENCE { INTEGER p, INTEGER g, ... } */
function readParameters(pem) {
  const body = /-----BEGIN DH PARAMETERS-----([^-]+)-----END/.exec(pem)?.[1];
  if (!body) throw new Usage('no DH PARAMETERS in that file');
  const element = (der) => {
    const more = der[1] < 0x80 ? 0 : der[1] & 0x7f; // bytes of the length
    const end = 2 + more + (more ? der.readUIntBE(2, more) : der[1]);
    return [der.subarray(2 + more, end), der.subarray(end)];
  };
  const minimal = (integer) => integer.subarray(integer[0] === 0 ? 1 : 0);
  const [sequence] = element(Buffer.from(body, 'base64'));
  const [p, rest] = element(sequence);
  return { p: minimal(p), g: minimal(element(rest)[0]) };
}

// ---- Secrets: an exponent for this session, and what both compute

function keyExchange({ p, g }, exponent = crypto.randomBytes(Math.floor(p.length / 8))) {
  const dh = crypto.createDiffieHellman(p, g);
  dh.setPrivateKey(exponent);
  return {
    value: leftPad(dh.generateKeys(), p.length),
    secretWith: (value) => leftPad(dh.computeSecret(value), p.length),
  };
}

const PSS = { padding: crypto.constants.RSA_PKCS1_PSS_PADDING, saltLength: 32 };
const pssSign = (message, key) => crypto.sign('sha256', message, { key, ...PSS });
const pssVerify = (message, key, signature) => crypto.verify('sha256', message, { key, ...PSS }, signature);

// ---- Words: RFC 1751 of the first 8 bytes of a hash, to compare by voice

const WORDS = fs.readFileSync(new URL('rfc1751.txt', import.meta.url), 'latin1').toLowerCase().trim().split(/\s+/);

function wordsOf(th, r) {
  const number = sha256('secure-chat/1 words ', th, r).readBigUInt64BE();
  let sum = 0n;
  for (let rest = number; rest; rest >>= 2n) sum += rest & 3n;
  const bits = (number << 2n) | (sum & 3n); // 64, and 2 of parity
  return [55n, 44n, 33n, 22n, 11n, 0n].map((shift) => WORDS[(bits >> shift) & 2047n]).join(' ');
}

// ---- Records

/**
 * What was said so far, and the keys for it. It can be one side's view, or that of a witness who reads a transcript:
 * the checks are the same, since each direction is known by its sender.
 */
class Conversation {
  constructor(bob, alice, z) {
    this.th = sha256(frame(bob.payload), frame(alice.payload));
    this.lanes = { bob: this.#lane('bob', bob.key, z), alice: this.#lane('alice', alice.key, z) };
    this.nonceOfBob = bob.nonce;
    this.kept = Object.entries({ b: bob.payload, a: alice.payload, z });
    this.closed = false;
  }

  /** As its keeper has it; only with both records 0 is it a transcript. */
  transcript() {
    return bytes(...this.kept.map(([tag, content]) => frame(bytes(tag, content))));
  }

  #lane(sender, publicKey, z) {
    const direction = DIRECTION[sender];
    const derive = (counter) => sha256(uint(4, counter), z, 'secure-chat/1 key ', direction, this.th);
    const modulus = Math.ceil(publicKey.asymmetricKeyDetails.modulusLength / 8);
    // `next` is the number of the record to come; `latest` and `previous` are digests of the last two.
    const state = { next: 0, latest: NONE, previous: NONE };
    return { direction, publicKey, modulus, key: derive(1), commitment: derive(2), ...state };
  }

  /** Alice sends record n when Bob has sent n records (0 to n-1); Bob does when Alice has sent one more. */
  isTurnOf(sender) {
    const { alice, bob } = this.lanes;
    return sender === 'alice' ? alice.next === bob.next : alice.next === bob.next + 1;
  }

  #signed(lane, nonce, ciphertext, tag) {
    return bytes('secure-chat/1 signature ', lane.direction, this.th, lane.commitment, nonce, ciphertext, tag);
  }

  #advance(sender, kind, body, signed, record) {
    const lane = this.lanes[sender];
    const [latest, previous] = [sha256(signed), lane.latest];
    Object.assign(lane, { next: lane.next + 1, latest, previous });
    this.kept.push([sender === 'alice' ? 'A' : 'B', record]);
    if (kind === READY && sender === 'bob') this.words = wordsOf(this.th, body); // the body is r
    this.closed = kind === CLOSE;
  }

  seal(sender, kind, body, sign, inReplyTo = this.lanes[OTHER[sender]].latest) {
    const lane = this.lanes[sender];
    const open = bytes([kind], inReplyTo, body, [0x80]);
    const plaintext = bytes(open, Buffer.alloc(-open.length & (BLOCK - 1)));
    const nonce = leftPad(uint(4, lane.next), 12);
    const gcm = crypto.createCipheriv('aes-256-gcm', lane.key, nonce);
    const ciphertext = bytes(gcm.update(plaintext), gcm.final());
    const tag = gcm.getAuthTag();
    const signed = this.#signed(lane, nonce, ciphertext, tag);
    const signature = sign(signed);
    const record = bytes(nonce, ciphertext, tag, signature);
    this.#advance(sender, kind, body, signed, record);
    return { plaintext, nonce, ciphertext, tag, signed: lane.latest, signature, record };
  }

  /** The checks of a record, in their order. */
  open(sender, record) {
    const [lane, other] = [this.lanes[sender], this.lanes[OTHER[sender]]];
    check(record.length <= limitOf(1 + lane.next), 'frame length', `a record of ${record.length} bytes`);
    const end = record.length - lane.modulus - 16; // of the ciphertext
    check(end > 12 && (end - 12) % BLOCK === 0, 'record length', 'the record has an impossible length');
    const [nonce, ciphertext] = [record.subarray(0, 12), record.subarray(12, end)];
    const [tag, signature] = [record.subarray(end, end + 16), record.subarray(end + 16)];
    const number = toInteger(nonce);
    const misplaced = `record ${number} where record ${lane.next} should be: replayed, dropped or reordered`;
    check(number === BigInt(lane.next), 'number', misplaced);
    const signed = this.#signed(lane, nonce, ciphertext, tag);
    check(pssVerify(signed, lane.publicKey, signature), 'signature', "the record's signature is not valid");
    const plaintext = this.#decrypt(lane, nonce, ciphertext, tag);
    const marker = plaintext.findLastIndex((byte) => byte !== 0);
    const padded = plaintext[marker] === 0x80 && marker >= plaintext.length - BLOCK;
    check(padded, 'padding', "the record's padding is not valid");
    check(marker >= 33, 'too short', 'the record is too short');
    const [kind, inReplyTo, body] = [plaintext[0], plaintext.subarray(1, 33), plaintext.subarray(33, marker)];
    check(kind in KINDS, 'type', 'the record is of no known type');
    const busy = kind === CLOSE && sender === 'bob' && lane.next === 0;
    check((kind === READY) === (lane.next === 0) || busy, 'ready', 'READY is record 0, and no other');
    const exactly = kind === READY && sender === 'bob' ? 32 : 0;
    const fits = kind === TEXT ? body.length <= TEXT_LIMIT : body.length === exactly;
    check(fits, 'body length', "the record's body has a wrong length");
    const text = kind === TEXT ? decodeUtf8(body) : '';
    const inTurn = this.isTurnOf(sender);
    check(kind === CLOSE || inTurn, 'turn', 'the other side spoke out of turn');
    const unread = !inReplyTo.equals(other.latest);
    const named = kind === CLOSE && inTurn && other.next > 1 && inReplyTo.equals(other.previous);
    check(!unread || named, 'in_reply_to', 'the record replies to another record than the last one');
    const bound = kind !== READY || sender !== 'bob' || commitmentTo(body).equals(this.nonceOfBob);
    check(bound, 'commitment', "Bob's r does not fit his nonce");
    this.#advance(sender, kind, body, signed, record);
    return { kind, text, unread };
  }

  #decrypt(lane, nonce, ciphertext, tag) {
    const gcm = crypto.createDecipheriv('aes-256-gcm', lane.key, nonce, { authTagLength: 16 }).setAuthTag(tag);
    try {
      return bytes(gcm.update(ciphertext), gcm.final());
    } catch {
      throw new Refused('tag', "the record's authentication tag is not valid");
    }
  }
}

function decodeUtf8(text) {
  try {
    return new TextDecoder('utf-8', { fatal: true, ignoreBOM: true }).decode(text);
  } catch {
    throw new Refused('utf-8', "the record's text is not valid UTF-8");
  }
}

// ---- The two roles

/** In ASCII alone, so that a line ends where it ends, whatever the reader takes for the end of a line. */
function emit(event, more) {
  const escape = (unit) => `\\u${unit.charCodeAt().toString(16).padStart(4, '0')}`;
  process.stdout.write(`${JSON.stringify({ event, ...more }).replace(/[^ -~]/g, escape)}\n`);
}

/** A connection: frames come in, and go out in their order. */
class Link {
  #sent = Promise.resolve();

  constructor(socket) {
    this.socket = socket;
    this.dropping = false;
    this.incoming = frames(socket, { dropping: () => this.dropping });
    socket.on('error', () => {}); // the reader is told
    socket.setKeepAlive(true, 15_000).setNoDelay(true); // Node has no setting for how often, and how many
  }

  send(...payloads) {
    const data = bytes(...payloads.map(frame));
    this.#sent = this.#sent.then(() => this.#write(data));
    this.#sent.catch(() => {}); // the reader is told
    return this.#sent;
  }

  async #write(data) {
    const write = promisify(this.socket.write).bind(this.socket);
    const stalled = new Cut('a send stalled for 30 seconds');
    for (let at = 0; at < data.length; at += PIECE) {
      const timer = setTimeout(() => this.socket.destroy(stalled), 30_000);
      await write(data.subarray(at, at + PIECE)).finally(() => clearTimeout(timer));
    }
  }

  /**
   * After a CLOSE of this side's own, which has two seconds to be sent: what comes is dropped. Then it shuts down its
   * half, and waits up to two seconds for the other side to close.
   */
  async finish() {
    this.dropping = true;
    const hangUp = async () => {
      while (!(await this.incoming.next()).done);
    };
    const closed = hangUp().catch(() => {});
    await Promise.race([this.#sent.catch(() => {}), closed, sleep(2000)]);
    if (this.socket.errored instanceof Cut) throw this.socket.errored;
    this.socket.end();
    await Promise.race([closed, sleep(2000)]);
    emit('closed');
  }
}

async function bob(options) {
  const own = readPrivateKey(fs.readFileSync(options.key));
  const group = readParameters(fs.readFileSync(options.dh, 'latin1'));
  const server = net.createServer({ allowHalfOpen: true }).listen(Number(options.port), options.host);
  await once(server, 'listening');
  emit('listening', { port: server.address().port });
  const [socket] = await once(server, 'connection');
  server.close();
  await meet(socket, 'bob', own, options, async (link) => {
    const [exchange, r] = [keyExchange(group), crypto.randomBytes(32)];
    const mine = makeHello('bob', own, { nonce: commitmentTo(r), ...group, value: exchange.value });
    link.send(mine.payload);
    const hello = await nextFrame(link.incoming);
    const hers = await checkHello(hello, 'alice', { group, other: own.der, pin: options.peer });
    const talk = new Conversation(mine, hers, exchange.secretWith(hers.value));
    talk.open('alice', await nextFrame(link.incoming));
    link.send((options.busy ? talk.seal('bob', CLOSE, '', own.sign) : talk.seal('bob', READY, r, own.sign)).record);
    return [talk, hers];
  });
}

async function alice(options) {
  const own = readPrivateKey(fs.readFileSync(options.key));
  const host = options.host ?? '127.0.0.1';
  const socket = net.connect({ port: Number(options.port), host, allowHalfOpen: true });
  await meet(socket, 'alice', own, options, async (link) => {
    const hello = await nextFrame(link.incoming);
    const his = await checkHello(hello, 'bob', { other: own.der, pin: options.peer });
    const exchange = keyExchange(his);
    const mine = makeHello('alice', own, { value: exchange.value });
    const talk = new Conversation(his, mine, exchange.secretWith(his.value));
    link.send(mine.payload, talk.seal('alice', READY, '', own.sign).record);
    if (talk.open('bob', await nextFrame(link.incoming)).kind === CLOSE) throw new Cut('Bob is busy');
    return [talk, his];
  });
}

/** A connection from the handshake to its end, whatever that is. */
async function meet(socket, me, own, options, handshake) {
  const link = new Link(socket);
  let talk, peer;
  const within = async (seconds, work) => {
    const timer = setTimeout(() => socket.destroy(new Cut(`nothing within ${seconds} seconds`)), seconds * 1000);
    return work.finally(() => clearTimeout(timer));
  };
  try {
    if (me === 'alice') await once(socket, 'connect');
    [talk, peer] = await within(30, handshake(link));
    if (talk.words) emit('connected', { peer: peer.fingerprint, words: talk.words });
    await (talk.closed ? link.finish() : converse(link, talk, me, own.sign));
  } catch (error) {
    throw error.syscall ? new Cut(error.message) : error;
  } finally {
    socket.destroy();
    if (options.transcript && talk?.words) fs.writeFileSync(options.transcript, talk.transcript());
  }
}

async function converse(link, talk, me, sign) {
  const lines = linesOf(process.stdin);
  let line;
  let arrival = nextFrame(link.incoming); // one read is always under way: a CLOSE may come at any time
  for (;;) {
    if (talk.isTurnOf(me)) line ??= lines.next();
    const first = await Promise.race([arrival, line].filter(Boolean));
    if (Buffer.isBuffer(first)) {
      const { kind, text, unread } = talk.open(OTHER[me], first);
      if (kind === CLOSE) return emit('close', { unread });
      emit('text', { text });
      arrival = nextFrame(link.incoming);
    } else if (first.done) {
      arrival.catch(() => {});
      link.send(talk.seal(me, CLOSE, '', sign).record);
      return link.finish();
    } else {
      const text = parseLine(first.value);
      link.send(talk.seal(me, TEXT, text, sign).record);
      emit('sent', { text });
      line = undefined;
    }
  }
}

async function* linesOf(stream) {
  let rest = '';
  for await (const chunk of stream.setEncoding('utf8')) {
    const lines = (rest + chunk).split('\n');
    rest = lines.pop();
    yield* lines;
  }
  if (rest) yield rest;
}

function parseLine(line) {
  let text;
  try {
    text = JSON.parse(line);
  } catch {}
  if (typeof text !== 'string') throw new Usage('standard input: not a JSON string');
  if (Buffer.byteLength(text) > TEXT_LIMIT) throw new Usage('standard input: a text of more than 1 MiB');
  return text;
}

// ---- Transcript: frames, each a tag and what it marks

const PLACES = { b: HELLO_LIMIT, a: HELLO_LIMIT, z: 512, A: RECORD_0_LIMIT, B: RECORD_0_LIMIT }; // the first five

/** One conversation, from its beginning. What is found is told at once; what is found in all is returned. */
async function readTranscript(file, tell = () => {}) {
  const limit = (index) => 1 + (Object.values(PLACES)[index] ?? RECORD_LIMIT);
  const incomplete = (why) => new Refused('transcript', why);
  const messages = [];
  let bob, alice, talk;
  let place = 0;
  for await (const payload of frames([file], { limit, incomplete })) {
    const [tag, content] = [payload.toString('latin1', 0, 1), payload.subarray(1)];
    const expected = Object.keys(PLACES)[place] ?? ['A', 'B'];
    check(tag && expected.includes(tag), 'transcript', `${JSON.stringify(tag)} has no place here`);
    check(!talk?.closed, 'transcript', 'something after a CLOSE');
    place += 1;
    if (tag === 'b') {
      bob = await checkHello(content, 'bob', {});
    } else if (tag === 'a') {
      alice = await checkHello(content, 'alice', { group: bob, other: bob.der });
    } else if (tag === 'z') {
      check(content.length === bob.p.length, 'transcript', 'Z is not as long as p');
      talk = new Conversation(bob, alice, content);
    } else {
      const from = { A: 'alice', B: 'bob' }[tag];
      const { kind, text, unread } = talk.open(from, content);
      check(place > 5 || kind === READY, 'transcript', 'a CLOSE in the place of READY');
      messages.push({ from, type: KINDS[kind], text, crossed: unread });
      if (place === 5) tell('conversation', { alice: alice.fingerprint, bob: bob.fingerprint, words: talk.words });
      if (kind === TEXT) tell('text', { from, text });
      if (kind === CLOSE) tell('close', { from, unread });
    }
  }
  check(place >= 5, 'transcript', 'no conversation, or one that has not begun');
  tell('end', { goodbye: talk.closed });
  return { words: talk.words, messages, ended: talk.closed };
}

// ---- Test vectors

/** RSASSA-PSS with a salt that is given: EMSA-PSS (RFC 8017, 9.1.1), then the private operation alone. */
function pssSignWithSalt(message, key, salt) {
  const bits = key.asymmetricKeyDetails.modulusLength;
  const length = Math.ceil((bits - 1) / 8);
  const h = sha256(Buffer.alloc(8), sha256(message), salt);
  const db = bytes(Buffer.alloc(length - 66), [1], salt);
  for (let i = 0; i < db.length; i++) db[i] ^= sha256(h, uint(4, i >> 5))[i & 31]; // MGF1
  db[0] &= 0xff >> (8 * length - (bits - 1));
  const encoded = leftPad(bytes(db, h, [0xbc]), Math.ceil(bits / 8));
  return crypto.privateDecrypt({ key, padding: crypto.constants.RSA_NO_PADDING }, encoded);
}

const hex = (text) => Buffer.from(text, 'hex');
const shorten = (text) => (text.length > 160 ? `${text.slice(0, 160)}...` : text);

class Different extends Error {
  constructor(name, value, given, computed) {
    super(shorten(`${name}: ${value}`));
    this.details = { case: name, value, given: shorten(String(given)), computed: shorten(String(computed)) };
  }
}

/** Both hellos of a conversation, its secret, and its own keys, each computed from what the vector was made from. */
async function sidesOf(vector, same = () => {}) {
  const group = { p: hex(vector.p), g: hex(vector.g) };
  const r = hex(vector.r);
  same('r', vector.bob.nonce, commitmentTo(r));
  const sides = {};
  for (const who of ['bob', 'alice']) {
    const given = vector[who];
    const own = readPrivateKey(given.private_key);
    same(`${who}.public_key`, given.public_key, own.der);
    const exchange = keyExchange(group, hex(given.exponent));
    same(`${who}.public_value`, given.public_value, exchange.value);
    const { payload } = makeHello(who, own, { nonce: hex(given.nonce), ...group, value: exchange.value });
    same(`${who}.hello`, given.hello, payload);
    const pin = fingerprintOf(own.key);
    sides[who] = { ...own, exchange, pin, hello: await checkHello(payload, who, { group, pin }) };
  }
  const z = sides.bob.exchange.secretWith(sides.alice.exchange.value);
  same('z', vector.z, z);
  same('z', vector.z, sides.alice.exchange.secretWith(sides.bob.exchange.value));
  return { group, r, sides, begin: () => new Conversation(sides.bob.hello, sides.alice.hello, z) };
}

const recordOf = ({ nonce, ciphertext, tag, signature }) => hex(nonce + ciphertext + tag + signature);

function comparison(name) {
  return (value, given, computed) => {
    const shown = Buffer.isBuffer(computed) ? computed.toString('hex') : computed;
    if (given !== shown) throw new Different(name, value, given, shown);
  };
}

function compareMessages(same, given, computed) {
  same('messages', given.length, computed.length);
  for (const [i, message] of given.entries()) {
    for (const what of ['from', 'type', 'text', 'crossed']) {
      same(`messages[${i}].${what}`, message[what], computed[i][what]);
    }
  }
}

async function checkConversation(vector) {
  const same = comparison(vector.name);
  const { r, sides, begin } = await sidesOf(vector, same);
  const [sealing, opening] = [begin(), begin()];
  same('th', vector.th, sealing.th);
  for (const { direction, key, commitment } of Object.values(sealing.lanes)) {
    same(`${direction} key`, vector[direction].key, key);
    same(`${direction} commitment`, vector[direction].commitment, commitment);
  }
  const said = [];
  for (const [i, given] of vector.records.entries()) {
    const { sender, type, text, in_reply_to: named } = given;
    const { next } = sealing.lanes[sender];
    const { latest, previous } = sealing.lanes[OTHER[sender]];
    const crossed = type === 'CLOSE' && named === previous.toString('hex');
    const body = type === 'READY' && sender === 'bob' ? r : text;
    const sign = (message) => pssSignWithSalt(message, sides[sender].privateKey, hex(given.salt));
    const sealed = sealing.seal(sender, KINDS.indexOf(type), body, sign, crossed ? previous : latest);
    const { record, ...made } = sealed;
    same(`records[${i}].in_reply_to`, named, crossed ? previous : latest);
    for (const [value, computed] of Object.entries({ number: next, ...made })) {
      same(`records[${i}].${value}`, given[value], computed);
    }
    const opened = opening.open(sender, record);
    same(`records[${i}].type`, type, KINDS[opened.kind]);
    same(`records[${i}].text`, text, opened.text);
    said.push({ from: sender, type, text, crossed });
  }
  if (said[1].type === 'CLOSE') return; // Bob is busy: there are no words, and there is no transcript
  same('words', vector.words, opening.words);
  const read = await readTranscript(opening.transcript());
  same('words in the transcript', vector.words, read.words);
  compareMessages(same, said, read.messages);
}

async function checkTranscript(vector, valid) {
  if (!valid) {
    const passed = await readTranscript(hex(vector.file)).catch((error) => {
      if (!(error instanceof Refused)) throw error;
    });
    if (passed) throw new Different(vector.name, 'check', vector.reason, 'passed');
    return;
  }
  const { words, messages } = await readTranscript(hex(vector.file));
  comparison(vector.name)('words', vector.words, words);
  compareMessages(comparison(vector.name), vector.messages, messages);
}

async function checkRefused(vector, conversations) {
  const conversation = conversations.find(({ name }) => name === vector.case);
  if (!conversation) throw new Different(vector.name, 'case', vector.case, 'no such conversation');
  conversation.sides ??= await sidesOf(conversation);
  const { group, sides, begin } = conversation.sides;
  const sender = OTHER[vector.receiver];
  const { der: other } = sides[vector.receiver];
  const state = { group: sender === 'alice' ? group : undefined, other, pin: sides[sender].pin };
  const talk = begin();
  for (const record of conversation.records.slice(0, vector.after)) talk.open(record.sender, recordOf(record));
  let refusal = 'passed';
  try {
    if ('hello' in vector) await checkHello(hex(vector.hello), sender, state);
    else talk.open(sender, hex(vector.record));
  } catch (error) {
    if (!(error instanceof Refused)) throw error;
    refusal = error.check;
  }
  // In which order a hello is checked does not matter; but here it is refused by the same check, or in the same key.
  const rsa = (name) => name.replace(/^rsa .*/, 'rsa');
  if (rsa(vector.check) !== rsa(refusal)) throw new Different(vector.name, 'check', vector.check, refusal);
}

async function vectors(files) {
  const read = (file) => JSON.parse(fs.readFileSync(file, 'utf8'));
  for (const file of files) {
    const { cases = [], valid = [], refused = [] } = read(file);
    const refers = cases.some((vector) => 'case' in vector);
    const conversations = refers ? read(path.join(path.dirname(file), 'conversations.json')).cases : [];
    const work = [
      ...cases.map((vector) => [vector, 'records' in vector ? checkConversation : checkRefused, conversations]),
      ...valid.map((vector) => [vector, checkTranscript, true]),
      ...refused.map((vector) => [vector, checkTranscript, false]),
    ];
    for (const [vector, compare, more] of work) {
      try {
        await compare(vector, more);
      } catch (error) {
        throw error instanceof Refused ? new Different(vector.name, 'check', 'passed', error.check) : error;
      }
    }
    emit('vectors', { file, cases: work.length });
  }
}

// ---- Command line

async function main() {
  const text = { type: 'string' };
  const options = { port: text, host: text, key: text, dh: text, peer: text, transcript: text };
  options.busy = { type: 'boolean' };
  const { values, positionals } = parseArgs({ options, allowPositionals: true });
  const [command, ...files] = positionals;
  const talks = values.port && values.key && !files.length;
  if (command === 'bob' && talks && values.dh) return bob(values);
  if (command === 'alice' && talks) return alice(values);
  if (command === 'verify' && files.length === 1) return readTranscript(fs.readFileSync(files[0]), emit);
  if (command === 'vectors' && files.length) return vectors(files);
  throw new Usage('bob | alice | verify FILE | vectors FILE... (see the head of this file)');
}

let status = 0;
try {
  await main();
} catch (error) {
  status = error instanceof Refused ? 3 : error instanceof Cut || error instanceof Different ? 1 : 2;
  if (error instanceof Refused) emit('refused', { check: error.check, why: error.message });
  else if (error instanceof Cut) emit('cut', { why: error.message });
  else if (error instanceof Different) emit('different', error.details);
  else console.error(error instanceof Usage ? error.message : error);
}
process.stdout.write('', () => process.exit(status)); // standard input may still be open
