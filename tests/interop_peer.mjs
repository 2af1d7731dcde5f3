// secure-chat/1 told a second time: both roles of the protocol, its transcripts and its test vectors, written from the
// specification in README.md alone. It is here to show that the specification is enough, and to talk to the programs.
//
//   node interop_peer.mjs bob   --port N [--host ADDR] --key KEY.pem --dh DH.pem [--peer SHA256:...]
//   node interop_peer.mjs alice --port N [--host ADDR] --key KEY.pem [--peer SHA256:...]
//   node interop_peer.mjs verify FILE
//   node interop_peer.mjs vectors FILE...
//
// Standard input: a JSON string a line, each a message; its end is a goodbye. Standard output: a JSON event a line.
// Exit status: 0 a goodbye, or all is well; 1 the connection was cut, or a vector differs; 2 usage; 3 a check failed.
//
// This is test code. BigInt is not constant-time, secrets are not wiped, and the first key met is taken without --peer.

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
const KINDS = ['READY', 'TEXT', 'CLOSE'];
const [READY, TEXT, CLOSE] = KINDS.keys();
const OTHER = { alice: 'bob', bob: 'alice' };
const DIRECTION = { alice: 'alice->bob', bob: 'bob->alice' }; // by sender
const NONE = Buffer.alloc(32); // the `answers` of one who has received nothing

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

const isSquare = (n, p) => power(n, (p - 1n) / 2n, p) === 1n; // Euler: so it has order q, or is 1
const isPrime = promisify(crypto.checkPrime);

// ---- Frame: a uint32 length, then so many bytes

const frame = (payload) => bytes(uint(4, payload.length), payload);

/** What is received: a hello, record 0, then records. */
const limitOf = (index) => [HELLO_LIMIT, RECORD_0_LIMIT][index] ?? RECORD_LIMIT;

/** The payloads in a stream of chunks: a socket, or the whole of a file. */
async function* frames(chunks, limit = limitOf, incomplete = (why) => new Cut(why)) {
  let [have, index] = [Buffer.alloc(0), 0];
  try {
    for await (const chunk of chunks) {
      have = bytes(have, chunk);
      while (have.length >= 4) {
        const length = have.readUInt32BE();
        check(length <= limit(index), 'frame length', `${length} bytes announced, the limit is ${limit(index)}`);
        if (have.length < 4 + length) break;
        const payload = have.subarray(4, 4 + length);
        have = have.subarray(4 + length);
        index += 1;
        yield payload;
      }
      chunks.setTimeout?.(have.length ? 30_000 : 0); // a frame that has begun may not stall
    }
  } catch (error) {
    throw error instanceof Refused ? error : new Cut(error.message);
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
  return { payload, key: own.key };
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

/** Check 2, Alice's alone: p = 2q + 1 with p and q prime, and g generates the squares. */
const passedBefore = new Set();
async function checkParameters(p, g) {
  const [bits, q] = [bitLength(p), (p - 1n) / 2n];
  check(bits >= 2048 && bits <= 4096, 'p size', `p has ${bits} bits`);
  check(p & 1n, 'p even', 'p is even');
  const safe = passedBefore.has(p) || ((await isPrime(p)) && (await isPrime(q)));
  check(safe, 'p safe prime', 'p is not a safe prime');
  passedBefore.add(p);
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
  check(n % 2n && n % 65537n, 'rsa parse', 'a modulus that is even, or a multiple of 65537');
  check(der.equals(derOf(key)), 'rsa encoding', 'an RSA key in another than its canonical encoding');
  const { modulusLength: bits, publicExponent } = key.asymmetricKeyDetails;
  check(bits >= 2048 && bits <= 4096, 'rsa bits', `an RSA key of ${bits} bits`);
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

/** All the checks of a hello. `own` is DER and `pin` a fingerprint, if there is any; Alice has no `group` yet. */
async function checkHello(payload, sender, { group, own, pin }) {
  const hello = parseHello(payload, sender);
  if (sender === 'bob') await checkParameters(toInteger(hello.p), toInteger(hello.g));
  hello.key = checkRsaKey(hello.der);
  checkPublicValue(hello.value, (group ?? hello).p);
  hello.fingerprint = fingerprintOf(hello.key);
  check(!own?.equals(hello.der), 'own key', 'the RSA key is my own'); // Check 5
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

/**
 * What was said so far, and the keys for it. It can be one side's view, or that of a witness who reads a transcript:
 * the checks are the same, since each direction is known by its sender.
 */
class Conversation {
  constructor(bob, alice, z) {
    this.th = sha256(frame(bob.payload), frame(alice.payload));
    this.lanes = { bob: this.#lane('bob', bob.key, z), alice: this.#lane('alice', alice.key, z) };
    this.closed = false;
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

  #advance(lane, signed, kind) {
    const [latest, previous] = [sha256(signed), lane.latest];
    Object.assign(lane, { next: lane.next + 1, latest, previous });
    this.closed = kind === CLOSE;
  }

  seal(sender, kind, text, sign, answers = this.lanes[OTHER[sender]].latest) {
    const lane = this.lanes[sender];
    const open = bytes([kind], answers, text, [0x80]);
    const plaintext = bytes(open, Buffer.alloc(-open.length & (BLOCK - 1)));
    const nonce = leftPad(uint(4, lane.next), 12);
    const gcm = crypto.createCipheriv('aes-256-gcm', lane.key, nonce);
    const ciphertext = bytes(gcm.update(plaintext), gcm.final());
    const tag = gcm.getAuthTag();
    const signed = this.#signed(lane, nonce, ciphertext, tag);
    const signature = sign(signed);
    this.#advance(lane, signed, kind);
    const record = bytes(nonce, ciphertext, tag, signature);
    return { plaintext, nonce, ciphertext, tag, signed: lane.latest, signature, record };
  }

  /** The checks of a record, in their order. */
  open(sender, record) {
    const [lane, other] = [this.lanes[sender], this.lanes[OTHER[sender]]];
    check(record.length <= limitOf(1 + lane.next), 'frame length', `a record of ${record.length} bytes`);
    const end = record.length - lane.modulus - 16; // of the ciphertext
    check(end > 12 && (end - 12) % BLOCK === 0, 'record length', `a ciphertext of ${end - 12} bytes`);
    const [nonce, ciphertext] = [record.subarray(0, 12), record.subarray(12, end)];
    const [tag, signature] = [record.subarray(end, end + 16), record.subarray(end + 16)];
    check(toInteger(nonce) === BigInt(lane.next), 'number', `number ${toInteger(nonce)}, ${lane.next} is next`);
    const signed = this.#signed(lane, nonce, ciphertext, tag);
    check(pssVerify(signed, lane.publicKey, signature), 'signature', `not signed by ${sender}`);
    const plaintext = this.#decrypt(lane, nonce, ciphertext, tag);
    const marker = plaintext.findLastIndex((byte) => byte !== 0);
    const padded = plaintext[marker] === 0x80 && marker >= plaintext.length - BLOCK;
    check(padded, 'padding', 'not 0x80 and zero bytes up to the next multiple of 256');
    check(marker >= 33, 'too short', `${marker} bytes are too few for type and answers`);
    const [kind, answers, text] = [plaintext[0], plaintext.subarray(1, 33), plaintext.subarray(33, marker)];
    check(kind in KINDS, 'type', `type ${kind}`);
    check((kind === READY) === (lane.next === 0), 'ready', `${KINDS[kind]} as record ${lane.next}`);
    check(text.length <= (kind === READY ? 0 : TEXT_LIMIT), 'text length', `a text of ${text.length} bytes`);
    const decoded = decodeUtf8(text);
    const inTurn = this.isTurnOf(sender);
    check(!this.closed && (kind === CLOSE || inTurn), 'turn', `${sender} had not the word`);
    const unread = !answers.equals(other.latest);
    const crossed = kind === CLOSE && inTurn && answers.equals(other.previous);
    check(!unread || crossed, 'answers', 'does not answer the latest record');
    this.#advance(lane, signed, kind);
    return { kind, text: decoded, unread };
  }

  #decrypt(lane, nonce, ciphertext, tag) {
    const gcm = crypto.createDecipheriv('aes-256-gcm', lane.key, nonce, { authTagLength: 16 }).setAuthTag(tag);
    try {
      return bytes(gcm.update(ciphertext), gcm.final());
    } catch {
      throw new Refused('tag', 'the GCM tag does not fit');
    }
  }
}

function decodeUtf8(text) {
  try {
    return new TextDecoder('utf-8', { fatal: true, ignoreBOM: true }).decode(text);
  } catch {
    throw new Refused('utf-8', 'not UTF-8');
  }
}

// ---- The two roles

/** In ASCII alone, so that a line ends where it ends, whatever the reader takes for the end of a line. */
function emit(event, more) {
  const escape = (unit) => `\\u${unit.charCodeAt().toString(16).padStart(4, '0')}`;
  process.stdout.write(`${JSON.stringify({ event, ...more }).replace(/[^ -~]/g, escape)}\n`);
}

async function bob(options) {
  const own = readPrivateKey(fs.readFileSync(options.key));
  const group = readParameters(fs.readFileSync(options.dh, 'latin1'));
  const server = net.createServer({ allowHalfOpen: true }).listen(Number(options.port), options.host);
  await once(server, 'listening');
  emit('listening', { port: server.address().port });
  const [socket] = await once(server, 'connection');
  server.close();
  await meet(socket, 'bob', own, async (incoming) => {
    const exchange = keyExchange(group);
    const mine = makeHello('bob', own, { ...group, value: exchange.value });
    socket.write(frame(mine.payload));
    const hello = await nextFrame(incoming);
    const hers = await checkHello(hello, 'alice', { group, own: own.der, pin: options.peer });
    const talk = new Conversation(mine, hers, exchange.secretWith(hers.value));
    talk.open('alice', await nextFrame(incoming));
    socket.write(frame(talk.seal('bob', READY, '', own.sign).record));
    return [talk, hers];
  });
}

async function alice(options) {
  const own = readPrivateKey(fs.readFileSync(options.key));
  const host = options.host ?? '127.0.0.1';
  const socket = net.connect({ port: Number(options.port), host, allowHalfOpen: true });
  await meet(socket, 'alice', own, async (incoming) => {
    const hello = await nextFrame(incoming);
    const his = await checkHello(hello, 'bob', { own: own.der, pin: options.peer });
    const exchange = keyExchange(his);
    const mine = makeHello('alice', own, { value: exchange.value });
    const talk = new Conversation(his, mine, exchange.secretWith(his.value));
    const ready = talk.seal('alice', READY, '', own.sign).record;
    socket.write(bytes(frame(mine.payload), frame(ready)));
    talk.open('bob', await nextFrame(incoming));
    return [talk, his];
  });
}

/** A connection from the handshake to its end, whatever that is. */
async function meet(socket, me, own, handshake) {
  const within = async (seconds, work) => {
    const timer = setTimeout(() => socket.destroy(new Cut(`nothing within ${seconds} seconds`)), seconds * 1000);
    return work.finally(() => clearTimeout(timer));
  };
  socket.on('error', () => {}); // the reader is told
  socket.on('timeout', () => socket.destroy(new Cut('a frame stalled for 30 seconds')));
  socket.setKeepAlive(true, 20_000).setNoDelay(true);
  try {
    if (me === 'alice') await within(120, once(socket, 'readable')); // Bob's first byte
    const incoming = frames(socket);
    const [talk, peer] = await within(10, handshake(incoming));
    emit('connected', { peer: peer.fingerprint });
    await converse(socket, talk, me, own.sign, incoming);
  } catch (error) {
    throw error.syscall ? new Cut(error.message) : error;
  } finally {
    socket.destroy();
  }
}

async function converse(socket, talk, me, sign, incoming) {
  const lines = linesOf(process.stdin);
  let line;
  let arrival = nextFrame(incoming); // one read is always under way: a CLOSE may come at any time
  for (;;) {
    if (talk.isTurnOf(me)) line ??= lines.next();
    const first = await Promise.race([arrival, line].filter(Boolean));
    if (Buffer.isBuffer(first)) {
      const { kind, text, unread } = talk.open(OTHER[me], first);
      if (kind === CLOSE) return emit('close', { text, unread });
      emit('text', { text });
      arrival = nextFrame(incoming);
    } else if (first.done) {
      return goodbye(socket, talk.seal(me, CLOSE, '', sign).record, arrival, incoming);
    } else {
      const text = parseLine(first.value);
      socket.write(frame(talk.seal(me, TEXT, text, sign).record));
      emit('sent', { text });
      line = undefined;
    }
  }
}

/** Its sender sends nothing after it, shuts down his side, and waits up to two seconds; what still comes is dropped. */
async function goodbye(socket, record, arrival, incoming) {
  socket.end(frame(record));
  const hangUp = async () => {
    for (await arrival; ; await nextFrame(incoming));
  };
  await Promise.race([hangUp().catch(() => {}), sleep(2000)]);
  emit('closed');
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

async function verify(file) {
  let hellos, talk;
  let records = 0;
  const end = () => talk && emit('end', { goodbye: talk.closed });
  const incomplete = (why) => new Refused('transcript', why);
  for await (const payload of frames([fs.readFileSync(file)], () => 1 + RECORD_LIMIT, incomplete)) {
    const [tag, content] = [payload.toString('latin1', 0, 1), payload.subarray(1)];
    if (tag === 'b') {
      check(!hellos || talk, 'transcript', 'a conversation that has not begun');
      end();
      [hellos, talk] = [{ bob: await checkHello(content, 'bob', {}) }, undefined];
    } else if (tag === 'a' && hellos && !hellos.alice) {
      hellos.alice = await checkHello(content, 'alice', { group: hellos.bob, own: hellos.bob.der });
    } else if (tag === 'z' && hellos?.alice && !talk) {
      check(content.length === hellos.bob.p.length, 'transcript', 'Z is not as long as p');
      talk = new Conversation(hellos.bob, hellos.alice, content);
      emit('conversation', { alice: hellos.alice.fingerprint, bob: hellos.bob.fingerprint });
    } else {
      const from = { A: 'alice', B: 'bob' }[tag];
      check(from && talk, 'transcript', `${JSON.stringify(tag)} has no place here`);
      const { kind, text, unread } = talk.open(from, content);
      records += 1;
      if (kind === TEXT) emit('text', { from, text });
      if (kind === CLOSE) emit('close', { from, text, unread });
    }
  }
  check(talk && records, 'transcript', 'no conversation, or one that has not begun');
  end();
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
  return { group, sides, begin: () => new Conversation(sides.bob.hello, sides.alice.hello, z) };
}

const recordOf = ({ nonce, ciphertext, tag, signature }) => hex(nonce + ciphertext + tag + signature);

async function checkConversation(vector) {
  const same = (value, given, computed) => {
    const shown = Buffer.isBuffer(computed) ? computed.toString('hex') : computed;
    if (given !== shown) throw new Different(vector.name, value, given, shown);
  };
  const { sides, begin } = await sidesOf(vector, same);
  const [sealing, opening] = [begin(), begin()];
  same('th', vector.th, sealing.th);
  for (const { direction, key, commitment } of Object.values(sealing.lanes)) {
    same(`${direction} key`, vector[direction].key, key);
    same(`${direction} commitment`, vector[direction].commitment, commitment);
  }
  for (const [i, given] of vector.records.entries()) {
    const { sender, kind } = given;
    const { next } = sealing.lanes[sender];
    const { latest, previous } = sealing.lanes[OTHER[sender]];
    const crossed = kind === 'CLOSE' && given.answers === previous.toString('hex');
    const answers = crossed ? previous : latest;
    const sign = (message) => pssSignWithSalt(message, sides[sender].privateKey, hex(given.salt));
    const { record, ...made } = sealing.seal(sender, KINDS.indexOf(kind), given.text, sign, answers);
    for (const [value, computed] of Object.entries({ number: next, answers, ...made })) {
      same(`records[${i}].${value}`, given[value], computed);
    }
    const opened = opening.open(sender, record);
    same(`records[${i}].kind`, kind, KINDS[opened.kind]);
    same(`records[${i}].text`, given.text, opened.text);
  }
}

async function checkRefused(vector, conversations) {
  const conversation = conversations.find(({ name }) => name === vector.case);
  if (!conversation) throw new Different(vector.name, 'case', vector.case, 'no such conversation');
  conversation.sides ??= await sidesOf(conversation);
  const { group, sides, begin } = conversation.sides;
  const sender = OTHER[vector.receiver];
  const { der: own } = sides[vector.receiver];
  const state = { group: sender === 'alice' ? group : undefined, own, pin: sides[sender].pin };
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
  // Which of these two refuses what is not quite DER is a matter of the parser.
  const [given, computed] = [vector.check, refusal].map((name) => (name === 'rsa parse' ? 'rsa encoding' : name));
  if (given !== computed) throw new Different(vector.name, 'check', vector.check, refusal);
}

async function vectors(files) {
  const read = (file) => JSON.parse(fs.readFileSync(file, 'utf8')).cases;
  for (const file of files) {
    const cases = read(file);
    const conversations = 'records' in cases[0] ? [] : read(path.join(path.dirname(file), 'conversations.json'));
    for (const vector of cases) {
      try {
        await ('records' in vector ? checkConversation(vector) : checkRefused(vector, conversations));
      } catch (error) {
        throw error instanceof Refused ? new Different(vector.name, 'check', 'passed', error.check) : error;
      }
    }
    emit('vectors', { file, cases: cases.length });
  }
}

// ---- Command line

async function main() {
  const text = { type: 'string' };
  const options = { port: text, host: text, key: text, dh: text, peer: text };
  const { values, positionals } = parseArgs({ options, allowPositionals: true });
  const [command, ...files] = positionals;
  const talks = values.port && values.key && !files.length;
  if (command === 'bob' && talks && values.dh) return bob(values);
  if (command === 'alice' && talks) return alice(values);
  if (command === 'verify' && files.length === 1) return verify(files[0]);
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
