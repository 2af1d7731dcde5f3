// What the page says about what protocol.js found: a sentence for each field and each check, and for each value its
// formula, where its inputs stand, and a command that computes it again.

const LONG = 8192; // bytes: what is longer is not written into a command, but read from the transcript file

/** One sentence for each field. */
function aboutField(frame, name) {
  const who = NAME[frame.sender];
  const peer = NAME[frame.receiver];
  const about = {
    length: `How many bytes follow in this frame: ${frame.announced}.`,
    version: 'Which protocol this is, in ASCII. There is no other to be talked down to.',
    nonce_B: 'A hash of r, which Bob keeps secret until his READY. So he has chosen r before he sees Alice\'s hello.',
    nonce_A: 'Random, and new for every session, so that no session is like another.',
    p: 'A large prime. All the numbers of Diffie-Hellman are counted modulo p.',
    g: 'The generator: the number that both sides raise to their secret exponents.',
    B: 'Bob\'s public value g^b mod p. Everybody may read it. Nobody finds b from it.',
    A: 'Alice\'s public value g^a mod p. Everybody may read it. Nobody finds a from it.',
    'RSA key': `${who}'s public key, as OpenSSL writes it. It verifies ${who}'s signatures.`,
    nonce: 'The number of this record in its direction, in 12 bytes. AES-GCM needs another one for every record.',
    ciphertext: 'What is said, encrypted with AES-256-GCM. It is padded, so its length tells little.',
    tag: 'The tag of AES-GCM. It shows that whoever encrypted this knew the key K.',
    signature: `${who}'s signature (RSA-PSS). It shows ${peer}, and later anybody else, that ${who} said this, here.`,
    Z: 'g^ab mod p. Both sides computed it; it was never sent. The transcript keeps it, so that it can be read.',
    type: `What kind of record this is: ${frame.type}.`,
    in_reply_to: 'The hash that was signed of the last record that the sender had received.',
    body: aboutBody(frame),
    padding: 'The byte 80, then zeros up to a multiple of 256, so that the length tells little.',
    payload: 'Bytes that cannot be taken apart, because what came before was not right.',
    rest: 'These bytes are left over.',
    unknown: 'There should be no such field.',
  };
  return about[name];
}

function aboutBody(frame) {
  if (frame.type === 'TEXT') return `What ${NAME[frame.sender]} said, in UTF-8.`;
  if (frame.type === 'READY' && frame.sender === 'bob') return 'r, to which Bob bound himself in his hello.';
  return 'Nothing: this record says only what its type says.';
}

/** What is checked, in the order of the README. The words of a refusal are in protocol.js. */
const CHECKS = {
  file: 'The entries of a transcript are in their order',
  'after CLOSE': 'Nothing follows a CLOSE',
  limit: 'The frame is not longer than it may be',
  cut: 'As many bytes arrive as the length announces',
  fields: 'The fields fill the frame exactly',
  version: 'The first field is secure-chat/1',
  'field count': 'There are six fields (Bob) or four (Alice)',
  'nonce length': 'The nonce has 32 bytes',
  'integer length': 'p and g have at most 512 bytes each',
  'integer encoding': 'Neither p nor g begins with a zero byte',
  'p size': 'p has 2048 to 4096 bits',
  'p even': 'p is odd',
  'p safe prime': 'p is a safe prime: p and q = (p - 1) / 2 are prime',
  'g subgroup': 'g is from 2 to p - 2, and a square modulo p',
  'rsa size of DER': 'The RSA key is at most 1024 bytes long',
  'rsa type': 'It says that it is an RSA key',
  'rsa parse': 'It can be taken apart; n is odd, and no multiple of e',
  'rsa bits': 'n has 2048 to 4096 bits',
  'rsa exponent': 'e is 65537',
  'rsa encoding': 'Every length and number in it is in its shortest form',
  'public value length': 'The public value is as long as p',
  'public value subgroup': 'It is from 2 to p - 2, and a square modulo p',
  'own key': 'The RSA key is not the receiver\'s own',
  trust: 'The RSA key is the pinned one, or the one asked for',
  'z length': 'Z is as long as p',
  'record length': 'What is left for the ciphertext is a positive multiple of 256',
  number: 'The nonce is the next number of this direction',
  signature: 'The signature is valid for the sender\'s key',
  tag: 'The tag is valid',
  padding: 'The padding is 80 and zeros, 256 bytes at most',
  'too short': 'Without padding, 33 bytes or more are left',
  type: 'The type is 0, 1 or 2',
  ready: 'Record 0 is READY, and no other record is (Bob may say CLOSE instead, if he is busy)',
  'body length': 'The body has a length that its type may have',
  'utf-8': 'The text is valid UTF-8',
  turn: 'It is the sender\'s turn, or the record is a CLOSE',
  in_reply_to: 'It replies to the receiver\'s latest record (a CLOSE may have crossed it)',
  commitment: 'SHA-256("secure-chat/1 commit " || r) is nonce_B',
};

const NOT_DONE = {
  'p safe prime': 'Only the cheap part is done here: p mod 3, 4^q = 1 mod p, and one round of Miller-Rabin for q. The '
    + 'program makes 64 rounds. A p that was made to deceive could pass here.',
  trust: 'Not in these bytes. It depends on --peer and on what is pinned on the receiver\'s machine.',
};

// ---- Commands. They hold no double quote, no dollar sign and no backslash: they paste into any shell.

const python = (code, file = '') => `python3 -c "${code}"${file}`;
const literal = (bytes) => `bytes.fromhex('${toHex(bytes)}')`;
const hashOf = (what) => python(`from hashlib import sha256; print(sha256(${what}).hexdigest())`);

/** The start of a code that needs a payload, the name for it, and what follows the command. */
function givenPayload({ entry, payload }) {
  if (payload.length <= LONG) return [`x = ${literal(payload)}; `, ''];
  if (entry.offset === undefined) return null;
  const end = entry.offset + payload.length;
  return [`import sys; x = open(sys.argv[1], 'rb').read()[${entry.offset}:${end}]; `, ' FILE'];
}

/**
 * The values that follow from a frame: what it is, how it is computed and from what (`from`: a label and where it
 * stands), what came out, what the command prints, and the command.
 */
function valuesOf(reading, frame) {
  if (frame.kind === 'hello') return valuesOfHello(reading, frame);
  if (frame.kind === 'z') return valuesOfZ(reading, frame);
  return frame.plaintext ? valuesOfRecord(reading, frame) : [];
}

const field = (frame, name) => (frame ? [[name, `${frame.index}-${name}`]] : []);

function valuesOfHello(reading, frame) {
  const { sender } = frame;
  const hello = reading[sender];
  const values = [];
  if (hello?.fingerprint) {
    const code = 'from base64 import b64decode, b64encode; from hashlib import sha256; '
      + `from Crypto.PublicKey import RSA; key = RSA.import_key(${literal(hello.der)}); `
      + 'blob = b64decode(key.export_key(\'OpenSSH\').split()[1]); '
      + 'print(\'SHA256:\' + b64encode(sha256(blob).digest()).decode().rstrip(\'=\'))';
    values.push({
      id: `fingerprint-${sender}`, name: `Fingerprint of ${NAME[sender]}'s key`,
      formula: '"SHA256:" || base64(SHA-256("ssh-rsa", e, n, each with its length))',
      about: 'A short name for the key. OpenSSH shows the same.',
      from: field(frame, 'RSA key'), result: hello.fingerprint, command: python(code),
    });
  }
  if (reading.p && hello) {
    const raised = (base) => python(`p = int('${reading.p.toString(16)}', 16); print(pow(${base}, (p - 1) // 2, p))`);
    const number = (value) => `int('${value.toString(16)}', 16)`;
    const symbol = sender === 'bob' ? 'B' : 'A';
    if (sender === 'bob') {
      values.push({
        id: 'fermat', name: '4^q mod p', formula: '4^q mod p, with q = (p - 1) / 2',
        about: 'It is 1 if p is a safe prime. For hardly any other p it is.',
        from: field(frame, 'p'), result: looksLikeSafePrime(reading.p) ? '1' : 'not 1, or q is not prime',
        command: raised('4'), prints: looksLikeSafePrime(reading.p) ? '1' : null,
      });
    }
    const value = toNumber(hello.value);
    const square = inSubgroup(value, reading.p);
    values.push({
      id: `subgroup-${symbol}`, name: `${symbol}^q mod p`, formula: `${symbol}^q mod p, with q = (p - 1) / 2`,
      about: `It is 1 if ${symbol} is in the subgroup of order q. The browser found it by the Jacobi symbol, which `
        + 'says the same, and is faster.',
      from: [...field(frame, symbol), ...field(reading.bob?.frame, 'p')], result: square ? '1' : 'not 1',
      command: raised(number(value)), prints: square ? '1' : null,
    });
  }
  if (sender === 'alice' && reading.th) {
    const [bob, alice] = [reading.bob.frame, frame].map(({ entry }) => entry.wire);
    values.push({
      id: 'th', name: 'th, the transcript hash', formula: 'th = SHA-256(frame of Bob\'s hello || frame of Alice\'s hello)',
      about: 'It stands for all that was said so far. Both sides mean the same hellos if they have the same th.',
      from: [['Bob\'s hello', `frame-${reading.bob.frame.index}`], ['Alice\'s hello', `frame-${frame.index}`]],
      result: reading.th, command: hashOf(literal(join(bob, alice))),
    });
  }
  return values;
}

function valuesOfZ(reading, frame) {
  if (!reading.lanes) return [];
  return ['alice', 'bob'].flatMap((sender) => {
    const lane = reading.lanes[sender];
    return [['K', 1, lane.key], ['C', 2, lane.commitment]].map(([symbol, block, result]) => {
      const start = `0000000${block}`;
      const label = `${VERSION} key ${DIRECTION[sender]}`;
      return {
        id: `${symbol}-${sender}`, name: `${symbol} of ${DIRECTION[sender]}`,
        formula: `${symbol} = SHA-256(${start} || Z || "${label}" || th)`,
        about: symbol === 'K' ? `The AES-256 key for what ${NAME[sender]} sends.`
          : 'It commits to K. It is never sent, but every signature of this direction covers it.',
        from: [...field(frame, 'Z'), ['th', 'value-th']], result,
        command: hashOf(`bytes.fromhex('${start}') + ${literal(reading.z)} + b'${label}' + ${literal(reading.th)}`),
      };
    });
  });
}

function valuesOfRecord(reading, frame) {
  const { sender, index, nonce, signed, plaintext } = frame;
  const lane = reading.lanes[sender];
  const context = `b'${VERSION} signature ${DIRECTION[sender]}' + ${literal(join(reading.th, lane.commitment))}`;
  const size = lane.signer.size;
  const given = givenPayload(frame);
  const command = (code) => (given ? python(given[0] + code, given[1]) : null);
  const shared = [['th', 'value-th'], ['C', `value-C-${sender}`]];
  const enciphered = ['nonce', 'ciphertext', 'tag'].flatMap((name) => field(frame, name));
  const key = field(reading[sender].frame, 'RSA key').map(([, place]) => [`${NAME[sender]}'s RSA key`, place]);
  const check = (id) => frame.checks.find((one) => one.id === id).passed;
  const long = plaintext.length > LONG;
  const values = [
    {
      id: `signed-${index}`, name: 'The hash that is signed',
      formula: `SHA-256("${VERSION} signature ${DIRECTION[sender]}" || th || C || nonce || ciphertext || tag)`,
      about: 'The next record of the other side names it, as what it replies to.',
      from: [...shared, ...enciphered], result: signed,
      command: command(`from hashlib import sha256; print(sha256(${context} + x[:-${size}]).hexdigest())`),
    },
    {
      id: `signature-${index}`, name: 'The signature',
      formula: 'RSASSA-PSS verification, with SHA-256 and a salt of 32 bytes',
      about: `Only ${NAME[sender]}'s private key makes one. Anybody can verify it.`,
      from: [...field(frame, 'signature'), ['the hash', `value-signed-${index}`], ...key],
      result: check('signature') ? 'valid' : 'not valid',
      prints: check('signature') ? 'valid' : null,
      command: command('from Crypto.Hash import SHA256; from Crypto.PublicKey import RSA; '
        + `from Crypto.Signature import pss; key = RSA.import_key(${literal(reading[sender].der)}); `
        + `pss.new(key, salt_bytes=32).verify(SHA256.new(${context} + x[:-${size}]), x[-${size}:]); print('valid')`),
    },
    {
      id: `plaintext-${index}`, name: long ? 'SHA-256 of the plaintext' : 'The plaintext',
      formula: check('tag') ? 'AES-256-GCM decryption with K and nonce, if the tag is valid'
        : 'AES-256-GCM decryption refuses the tag. Below is what would come out without it',
      about: 'It is taken apart below.',
      from: [['K', `value-K-${sender}`], ...enciphered],
      result: long ? frame.digest : plaintext, prints: check('tag') ? undefined : null,
      command: command('from hashlib import sha256; '.repeat(long) + 'from Crypto.Cipher import AES; '
        + `aes = AES.new(${literal(lane.key)}, AES.MODE_GCM, nonce=${literal(nonce)}); `
        + `plaintext = aes.decrypt_and_verify(x[12:-${size + 16}], x[-${size + 16}:-${size}]); `
        + `print(${long ? 'sha256(plaintext).hexdigest()' : 'plaintext.hex()'})`),
    },
  ];
  if (sender === 'bob' && frame.type === 'READY') {
    const r = [['r', `${index}-body`]];
    values.push({
      id: 'commitment', name: 'What Bob bound himself to', formula: 'nonce_B = SHA-256("secure-chat/1 commit " || r)',
      about: 'It must be the nonce of Bob\'s hello.',
      from: [...r, ...field(reading.bob.frame, 'nonce_B')], result: frame.commitment,
      command: hashOf(`b'${VERSION} commit ' + ${literal(reading.r)}`),
    }, {
      id: 'words', name: 'The six words',
      formula: 'RFC 1751 of the first 8 bytes of SHA-256("secure-chat/1 words " || th || r), in lower case',
      about: 'For the two people to compare by voice. The first three stand on Bob\'s screen, the last three on '
        + 'Alice\'s; each reads theirs out, and types what the other reads.',
      from: [['th', 'value-th'], ...r], result: reading.words.join(' '),
      command: python('from hashlib import sha256; from Crypto.Util.RFC1751 import key_to_english; '
        + `h = sha256(b'${VERSION} words ' + ${literal(join(reading.th, reading.r))}).digest(); `
        + 'print(key_to_english(h[:8]).lower())'),
    });
  }
  return values;
}

/** What a command prints; null where it ends in an error, or in what the page has not computed. */
function printed(value) {
  if (value.prints !== undefined) return value.prints;
  return typeof value.result === 'string' ? value.result : toHex(value.result);
}

/** What cannot be computed from these bytes, and why. */
function impossible(frame) {
  const who = NAME[frame.sender];
  if (frame.kind === 'z') {
    return [['Z = B^a = A^b mod p', 'To compute it, one needs a or b. Both programs forgot them after the handshake. So '
      + 'Z stands in the transcript, and is taken from there. A wrong Z would give a wrong C, and no signature would be '
      + 'valid.']];
  }
  if (frame.kind !== 'hello') return [];
  const exponent = frame.sender === 'bob' ? 'b' : 'a';
  const value = exponent.toUpperCase();
  const list = [[`${exponent}, ${who}'s secret exponent`, `It was drawn at random, used once, and never stored. To find `
    + `it from ${value} is the discrete logarithm. Nobody knows how to do that for a p as large as this one.`],
  [`${who}'s private RSA key`, `It never leaves ${who}'s machine. To find it from the public key, one has to factor n.`]];
  if (frame.sender === 'bob') list.push(['r', 'Not yet: nonce_B is its hash. It comes with Bob\'s READY.']);
  return list;
}

// ---- Questions, with answers that the page finds out for itself.

/** A text in which one bit makes something else: what to look for, and what it would become. */
function bitRiddle(reading) {
  const texts = reading.frames.filter(({ type, text }) => type === 'TEXT' && text.length < 2000);
  for (const [sign, frame] of [/1/, /[A-Za-z]/].flatMap((one) => texts.map((text) => [one, text]))) {
    const match = sign.exec(frame.text);
    if (!match) continue;
    const [letter] = match;
    const other = letter === '1' ? '9' : (letter === letter.toLowerCase() ? letter.toUpperCase() : letter.toLowerCase());
    const text = frame.text.slice(0, match.index) + other + frame.text.slice(match.index + 1);
    return { frame, letter, other, text };
  }
  return null;
}
