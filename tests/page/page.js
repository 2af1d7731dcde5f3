// The page itself: it shows a Reading, and lets the reader change the bytes. Whatever comes from the file is put into the
// page as text (createTextNode), never as markup.

const given = JSON.parse(document.getElementById('data').textContent);
const $ = (id) => document.getElementById(id);

const MARKS = { passed: '✓', refused: '✗', open: '–' };
const SHORT = 48; // bytes: a field that is longer is folded
const HEAD = 32;
const ROW = 16;
const MORE = 512; // bytes that are unfolded at a time
const TEXT_START = 600; // characters of a text that are shown at first
const TEXT_MORE = 20000;
const BUBBLES = 40;
const OPEN_AT_FIRST = 6; // cards
const MANY = 60; // cards: so many are not opened all at once

const state = {
  original: [], // the entries of the file
  entries: [], // the entries as they are now
  fault: null,
  reading: null,
  same: new Map(), // which value is the same as the program's
  opened: new Set(), // cards that are unfolded, by their uid
  unfolded: new Map(), // how many bytes more are shown, by uid and field
  selected: null, // the byte that is being changed: { uid, at }
  bubbles: BUBBLES,
  answers: new Map(), // to the questions
  run: 0,
};

/** Make an element. Strings among its children become text. */
function make(tag, attributes = {}, ...children) {
  const element = document.createElement(tag);
  for (const [name, value] of Object.entries(attributes)) {
    if (typeof value === 'function') element.addEventListener(name, value);
    else if (value === true) element.setAttribute(name, '');
    else if (value !== false && value !== null && value !== undefined) element.setAttribute(name, value);
  }
  element.append(...children.flat().filter((child) => child !== null && child !== false && child !== undefined));
  return element;
}

const button = (label, click, attributes = {}) => make('button', { type: 'button', click, ...attributes }, label);
const plural = (count, thing) => `${count.toLocaleString('en')} ${thing}${count === 1 ? '' : 's'}`;
const byteHex = (byte) => byte.toString(16).padStart(2, '0');

function mark(kind, said) {
  return make('span', { class: `mark ${kind}` }, make('span', { 'aria-hidden': 'true' }, MARKS[kind]), ' ', said);
}

// ---- Text that somebody sent

// What cannot be seen, or turns round what stands beside it, is shown by its number.
const INVISIBLE = new RegExp(`[${[
  '\\u0000-\\u0009\\u000b-\\u001f\\u007f-\\u00a0', // controls, but for the line feed
  '\\u00ad\\u034f\\u115f\\u1160\\u17b4\\u17b5\\u180b-\\u180f\\u3164\\uffa0', // nothing to see
  '\\u061c\\u200e\\u200f\\u202a-\\u202e\\u2066-\\u2069', // directions
  '\\u2000-\\u200c\\u2028\\u2029\\u202f\\u205f-\\u2065\\u206a-\\u206f\\u3000', // spaces, line ends
  '\\ufeff\\ufff0-\\ufffb\\u{e0000}-\\u{e0fff}', // marks and tags
].join('')}]`, 'u');

/** Part of a text, as nodes. */
function textNodes(text) {
  const nodes = [];
  let plain = '';
  for (const character of text) {
    if (!INVISIBLE.test(character)) {
      plain += character;
      continue;
    }
    const code = `U+${character.codePointAt(0).toString(16).toUpperCase().padStart(4, '0')}`;
    nodes.push(plain, make('span', { class: 'code-point' }, code));
    plain = '';
  }
  return [...nodes, plain];
}

/** A text in a box of its own, of which the beginning is shown. */
function textBox(text, label) {
  const box = make('div', { class: 'text', dir: 'auto', role: 'group', 'aria-label': label });
  let shown = 0;
  const more = button('', () => show(TEXT_MORE), { class: 'fold' });
  const show = (count) => {
    let end = Math.min(shown + count, text.length);
    const code = text.charCodeAt(end - 1);
    if (code >= 0xd800 && code < 0xdc00 && end < text.length) end += 1; // not between two halves of a character
    box.append(...textNodes(text.slice(shown, end)));
    shown = end;
    more.textContent = `… ${plural(text.length - shown, 'more character')}`;
    if (shown === text.length) more.remove();
  };
  const whole = make('div', {}, box, more);
  show(TEXT_START);
  if (!text) box.append(make('i', {}, 'an empty text'));
  return whole;
}

// ---- The picture of some bytes

const FIELD_COLOURS = {
  length: 0, version: 1, nonce_B: 2, nonce_A: 2, nonce: 2, p: 3, ciphertext: 3, g: 4, tag: 4, B: 5, A: 5, body: 5,
  'RSA key': 6, signature: 6, Z: 6, type: 1, in_reply_to: 2, padding: 0,
};

/** What is to be said of a byte, when it is pointed at. */
function describeByte(bytes, fieldOf, at) {
  const byte = bytes[at];
  const { name, start, end, lead = 0 } = fieldOf;
  const inside = at < start + lead ? `length of ${name}, byte ${at - start + 1} of ${lead}`
    : `${name}, byte ${at - start - lead + 1} of ${end - start - lead}`;
  const part = fieldOf.parts?.find(([, from, to]) => at >= from && at < to);
  const character = byte > 0x20 && byte < 0x7f ? `, “${String.fromCharCode(byte)}” in ASCII` : '';
  return `${inside}${part ? ` (${part[0]})` : ''}: ${byteHex(byte)} = ${byte}${character}`;
}

/**
 * Which bytes of a field are shown: a list of [from, to]. What lies between them is folded. The rows of `wanted` bytes
 * (those that are changed, or being changed) are always there.
 */
function visible({ name, start, end, lead = 0 }, key, wanted) {
  const padding = name === 'padding';
  if (end - start <= (padding ? ROW : SHORT + lead)) return [[start, end]];
  const head = start + lead + (padding ? 8 : HEAD) + (state.unfolded.get(key) ?? 0);
  const pieces = [[start, head]];
  for (const at of wanted) {
    const row = at - ((at - start - lead) % ROW);
    pieces.push([row, row + ROW]);
  }
  if (!padding) pieces.push([end - ROW, end]);
  const shown = [];
  for (const [from, to] of pieces.sort(([a], [b]) => a - b)) {
    const last = shown.at(-1);
    if (last && from <= last[1]) last[1] = Math.max(last[1], Math.min(to, end));
    else if (from < end) shown.push([from, Math.min(to, end)]);
  }
  return shown;
}

/**
 * A picture: a row for each field, with its name, its length, what it is for, and its bytes. `choose` is called with the
 * place of a byte that was clicked.
 */
function picture(frame, { bytes, fields, base = 0, label, choose, original }) {
  const { uid } = frame.entry;
  const said = make('p', { class: 'pointed' }, 'Point at a byte.');
  const selected = state.selected?.uid === uid ? state.selected.at - (base ? 16 : 0) : -1; // 16: length and nonce
  const wanted = selected < 0 ? [] : [selected];
  if (original && original !== bytes) {
    bytes.forEach((byte, at) => {
      if (byte !== original[at] && wanted.length < 200) wanted.push(at);
    });
  }
  const rows = fields.map((one) => {
    const key = `${uid}/${base}/${one.name}/${one.start}`;
    const prefix = [];
    const cells = [];
    const add = ([from, to]) => {
      for (let at = from; at < to; at += 1) {
        const lead = at < one.start + (one.lead ?? 0);
        const part = one.parts?.some(([, start, end]) => at >= start && at < end);
        const changed = original && original[at] !== bytes[at];
        const chosen = choose && selected === at;
        (lead ? prefix : cells).push(make('button', {
          type: 'button', tabindex: '-1', 'data-at': at, 'data-focus': `${uid}/${base}/${at}`,
          class: `byte${lead ? ' prefix' : ''}${part ? ' part' : ''}${changed ? ' changed' : ''}`,
          'aria-pressed': chosen ? 'true' : null,
          'aria-label': `${byteHex(bytes[at])}, ${changed ? 'changed, ' : ''}${one.name} ${at - one.start}`,
        }, byteHex(bytes[at])));
      }
    };
    const fold = (label, rest) => cells.push(button(label, () => {
      if (rest) state.unfolded.set(key, (state.unfolded.get(key) ?? 0) + MORE);
      else state.unfolded.delete(key);
      refreshCard(uid);
    }, { class: 'fold', 'data-focus': `fold/${key}` }));
    const gap = (from, to) => {
      const rest = to - from;
      if (rest <= 0) return;
      const zeros = bytes.subarray(from, to).every((byte) => byte === 0);
      const step = rest > MORE ? `${MORE} of ${rest.toLocaleString('en')} bytes more` : `${plural(rest, 'byte')} more`;
      fold(`… ${step}${zeros ? ', all zero' : ''}`, rest);
    };
    let shown = one.start;
    for (const [from, to] of visible(one, key, wanted.filter((at) => at >= one.start && at < one.end))) {
      gap(shown, from);
      add([from, to]);
      shown = to;
    }
    gap(shown, one.end);
    if (state.unfolded.has(key)) fold('fold', 0);
    const length = one.end - one.start - (one.lead ?? 0);
    return make('div', {
      class: `field colour-${FIELD_COLOURS[one.name] ?? 0}`, id: cssId(`${frame.index}-${one.name}`),
    }, make('div', { class: 'name' },
      make('h5', {}, make('span', { class: 'swatch', 'aria-hidden': 'true' }), one.name, ' ',
        make('small', {}, `${plural(length, 'byte')}${one.lead ? `, after ${one.lead} of length` : ''}`)),
      make('p', {}, aboutField(frame, one.name) ?? ''),
      one.parts ? make('p', { class: 'note' }, 'Underlined: the modulus n, and the exponent e.') : null),
    make('div', { class: 'bytes' }, prefix.length ? make('div', { class: 'prefixes' }, prefix) : null,
      make('div', { class: 'grid' }, cells)));
  });
  const group = make('div', { class: 'picture', role: 'group', 'aria-label': label }, rows, said);
  const fieldAt = (at) => fields.find(({ start, end }) => at >= start && at < end);
  const point = (event) => {
    const at = event.target.dataset?.at;
    if (at === undefined) return;
    said.textContent = describeByte(bytes, fieldAt(Number(at)), Number(at));
    group.querySelectorAll('.field.pointed-at').forEach((row) => row.classList.remove('pointed-at'));
    event.target.closest('.field').classList.add('pointed-at');
  };
  group.addEventListener('pointerover', point);
  group.addEventListener('focusin', (event) => {
    point(event);
    if (event.target.dataset.at === undefined) return;
    group.querySelectorAll('.byte[tabindex="0"]').forEach((cell) => cell.setAttribute('tabindex', '-1'));
    event.target.setAttribute('tabindex', '0');
  });
  group.addEventListener('click', (event) => {
    if (event.target.dataset.at !== undefined) choose?.(Number(event.target.dataset.at));
  });
  group.addEventListener('keydown', moveByArrows);
  group.querySelector('.byte')?.setAttribute('tabindex', '0');
  return group;
}

/** The arrows move among the bytes of a picture; up and down go to the row above and below. */
function moveByArrows(event) {
  const cells = [...event.currentTarget.querySelectorAll('.byte')];
  const here = cells.indexOf(event.target);
  const steps = { ArrowRight: 1, ArrowLeft: -1, Home: -here, End: cells.length - 1 - here };
  let target = cells[here + steps[event.key]];
  if (event.key === 'ArrowDown' || event.key === 'ArrowUp') {
    const { left, top } = event.target.getBoundingClientRect();
    const beyond = event.key === 'ArrowDown' ? cells.slice(here + 1) : cells.slice(0, here).reverse();
    const distance = (cell) => {
      const place = cell.getBoundingClientRect();
      return Math.abs(place.top - top) < 2 ? Infinity : Math.abs(place.top - top) * 1000 + Math.abs(place.left - left);
    };
    target = beyond.slice(0, 100).reduce((best, cell) => (best && distance(best) <= distance(cell) ? best : cell), null);
  }
  if (here < 0 || !target || !(event.key in steps || event.key.startsWith('Arrow'))) return;
  event.preventDefault();
  target.focus();
}

const cssId = (place) => place.replace(/[^A-Za-z0-9_-]/g, '_');

// ---- One frame: a card

function card(frame) {
  const { uid } = frame.entry;
  const open = state.opened.has(uid);
  const refusals = state.reading.refusals.filter((one) => one.frame === frame);
  const first = state.reading.refused;
  const unreached = first && first.frame && frame.index > first.frame.index;
  const passed = frame.checks.filter((one) => one.passed).length;
  let result = mark('passed', plural(passed, 'check'));
  if (first?.frame === frame) result = mark('refused', 'refused');
  else if (unreached) result = mark('open', 'not received any more');
  const way = frame.kind === 'z' ? 'not sent: both computed it' : `${NAME[frame.sender]} → ${NAME[frame.receiver]}`;
  const title = frame.type ? `${frame.title}: ${frame.type}` : frame.title;
  const heading = make('h3', {}, make('button', {
    type: 'button', 'aria-expanded': String(open), 'data-focus': `card/${uid}`, click: () => toggle(uid),
  }, make('span', { class: 'title' }, title), open || frame.type !== 'TEXT' ? null : make('span', {
    class: 'snippet', dir: 'auto' }, '“', textNodes(frame.text.slice(0, 60)),
  frame.text.length > 60 ? ' …' : '', '”'),
  make('span', { class: 'way' },
    `${way}, ${plural(frame.entry.wire.length - (frame.kind === 'z' ? 4 : 0), 'byte')}`), result));
  const classes = ['card', frame.sender ?? 'both', refusals.length && 'has-refusal', unreached && 'unreached'];
  const element = make('article', {
    class: classes.filter(Boolean).join(' '), id: `frame-${frame.index}`, 'data-uid': uid }, heading);
  if (open) element.append(...cardBody(frame, refusals));
  return element;
}

function cardBody(frame, refusals) {
  const wire = frame.entry.wire;
  const original = state.original[frame.entry.from]?.wire;
  const isZ = frame.kind === 'z';
  const say = (text, ...more) => make('p', {}, text, ...more);
  const parts = [say(aboutFrame(frame))];
  if (frame.kind === 'hello' || frame.type === 'READY') {
    parts.push(make('p', { class: 'note' }, 'Sent in ', functionName(given.where[`handshake ${frame.sender}`]),
      ', received in ', functionName(given.where[`handshake ${frame.receiver}`]), '.'));
  }
  if (frame.type === 'TEXT') {
    const honest = frame.checks.every((one) => one.passed && one.reached);
    parts.push(say(honest ? `${NAME[frame.sender]} says:` : 'Without the checks that refuse it, the text would read:'),
      textBox(frame.text, `what ${NAME[frame.sender]} says`));
  }
  parts.push(make('h4', {}, isZ ? 'The bytes of Z' : 'The frame'),
    picture(frame, {
      bytes: wire, fields: frame.fields, original, label: `the bytes of ${frame.title}`,
      choose: (at) => choose(frame.entry.uid, at),
    }));
  if (state.selected?.uid === frame.entry.uid) parts.push(editor(frame, original));
  if (frame.kind === 'record') parts.push(recordTools(frame));
  if (frame.checks.length) parts.push(checkTable(frame));
  if (refusals.length) parts.push(storyBox(refusals, frame));
  const values = valuesOf(state.reading, frame);
  const nots = impossible(frame);
  if (values.length || nots.length) parts.push(make('h4', {}, 'What is computed'));
  parts.push(...values.map(valueBox));
  if (frame.parts) {
    parts.push(make('h4', {}, 'The plaintext, taken apart'), picture(frame, {
      bytes: frame.plaintext, fields: frame.parts, base: 1, label: `the plaintext of ${frame.title}`,
      choose: (at) => choose(frame.entry.uid, 4 + 12 + at),
    }), replyNote(frame), say('A byte of the ciphertext is the byte of the plaintext in the same place, XOR a byte of '
      + 'the key stream. Click a byte here, and the one that encrypts it is opened above.'));
  }
  if (nots.length) {
    parts.push(make('h4', {}, 'What cannot be computed'), make('dl', {}, nots.flatMap(([what, why]) => [
      make('dt', {}, what), make('dd', {}, why)])));
  }
  return [make('div', { class: 'body' }, parts)];
}

function aboutFrame(frame) {
  if (frame.kind === 'z') {
    return 'From Alice\'s A and his own b, Bob computes Z. From Bob\'s B and her own a, Alice computes the same Z. Two keys '
      + 'are made of it, one for each direction.';
  }
  const name = NAME[frame.sender];
  if (frame.kind === 'hello') {
    return frame.sender === 'bob' ? 'Bob speaks first. He sends his numbers for Diffie-Hellman, and his RSA key.'
      : 'Alice has checked Bob\'s hello, and answers with her own number, and her RSA key.';
  }
  return {
    READY: `${name} shows with the first encrypted and signed record that the key is ${name}'s own.`
      + (frame.sender === 'bob' ? ' With it, Bob opens r, which he had bound himself to.' : ''),
    TEXT: `${name}'s ${frame.sender === 'alice' ? 'request' : 'reply'}, encrypted and signed.`,
    CLOSE: `${name} leaves.${frame.crossed ? ` It crossed ${NAME[frame.receiver]}'s latest record on the way.` : ''}`,
  }[frame.type] ?? 'A record that cannot be opened.';
}

function replyNote(frame) {
  const to = frame.repliesTo;
  if (same(frame.inReplyTo, NOTHING)) return make('p', {}, 'in_reply_to: 32 zero bytes. Alice has received no record yet.');
  if (!to) return make('p', {}, 'in_reply_to: it is the hash of no record that stands here.');
  return make('p', {}, 'in_reply_to: the hash that was signed of ',
    goTo(to.title, `value-signed-${to.index}`), '.');
}

function checkTable(frame) {
  const rows = frame.checks.map((check) => {
    const kind = check.passed ? 'passed' : 'refused';
    const said = check.passed ? (check.reached ? 'passed' : 'would pass') : (check.reached ? 'refused' : 'would refuse');
    const where = given.where[check.id] ?? '';
    return make('tr', { class: `${kind}${check.reached ? '' : ' unreached'}`, 'data-check': check.id },
      make('td', {}, mark(kind, make('span', { class: 'said' }, said))),
      make('td', {}, CHECKS[check.id], NOT_DONE[check.id] ? make('span', { class: 'note' }, NOT_DONE[check.id]) : null,
        check.passed ? null : make('strong', { class: 'words' }, `“${check.words}”`)),
      make('td', {}, functionName(where)));
  });
  if (frame.kind === 'hello') {
    rows.push(make('tr', {}, make('td', {}, mark('open', make('span', { class: 'said' }, 'not here'))),
      make('td', {}, CHECKS.trust, make('span', { class: 'note' }, NOT_DONE.trust)),
      make('td', {}, functionName(given.where.trust))));
  }
  const who = frame.receiver ? `${NAME[frame.receiver]} checks, when it arrives` : 'Whoever reads the transcript checks';
  return make('div', {}, make('h4', {}, who), make('table', {}, make('thead', {}, make('tr', {},
    make('th', { scope: 'col' }, 'Result'), make('th', { scope: 'col' }, 'What'), make('th', { scope: 'col' }, 'Where'))),
  make('tbody', {}, rows)));
}

/** Where something is done: a function, which may be broken where its name has a joint. */
function functionName(where) {
  const pieces = where.replace('crypto_utils.py: ', '').split(/(?<=[._])/);
  return make('code', {}, pieces.flatMap((piece) => [piece, make('wbr')]));
}

/** The entry in which a value, a field or a frame stands. */
function homeOf(place) {
  const kinds = { 'value-th': 'a', 'value-commitment': 'B', 'value-words': 'B' };
  const kind = /^value-[KC]-/.test(place) ? 'z' : kinds[place];
  const index = /^(?:frame-|value-\D*)?(\d+)/.exec(place)?.[1];
  return kind ? state.entries.find(({ tag }) => tag === kind) : state.entries[index];
}

/** Something that takes the reader to where a value stands; pointing at it marks the place. */
function goTo(label, place) {
  const home = state.reading.frames.find(({ entry }) => entry === homeOf(place));
  const light = (on) => () => $(cssId(place))?.classList.toggle('pointed-at', on);
  return make('a', {
    href: `#${cssId(place)}`,
    title: home ? `in ${home.title}` : null,
    pointerenter: light(true),
    pointerleave: light(false),
    focus: light(true),
    blur: light(false),
    click: (event) => {
      event.preventDefault();
      show(place);
    },
  }, label);
}

/** Unfold what is needed, scroll there, and let it light up. */
function show(place) {
  const home = homeOf(place);
  if (home && !state.opened.has(home.uid)) toggle(home.uid);
  const target = $(cssId(place));
  if (!target) return;
  target.setAttribute('tabindex', '-1');
  target.focus({ preventScroll: true });
  target.scrollIntoView({ block: 'center' });
  target.classList.remove('lit');
  requestAnimationFrame(() => target.classList.add('lit'));
}

function valueBox(value) {
  const bytes = typeof value.result !== 'string';
  const agrees = state.same.get(value.id);
  let result = null;
  if (agrees === true) result = mark('passed', 'the same as the program\'s');
  else if (agrees === false) result = mark('refused', 'not what the program found in the file');
  else if (value.result === '1' || value.result === 'valid') result = mark('passed', 'computed here');
  else if (!bytes && value.result.startsWith('not')) result = mark('refused', 'not as it should be');
  const shown = bytes ? (value.result.length > 64 ? shorten(value.result) : toHex(value.result)) : value.result;
  return make('div', { class: 'value', id: cssId(`value-${value.id}`) },
    make('h5', {}, value.name, ' ', result),
    make('p', {}, value.about),
    make('p', { class: 'formula' }, make('code', {}, value.formula)),
    value.from.length ? make('p', { class: 'from' }, 'from ', value.from.flatMap(([label, place], i) => [
      i ? ', ' : '', goTo(label, place)])) : null,
    make('p', { class: 'result' }, make('code', {}, shown)),
    commandBox(value));
}

const shorten = (bytes) => `${toHex(bytes.subarray(0, 32))} … ${toHex(bytes.subarray(-16))}`;

function commandBox(value) {
  if (!value.command) return make('p', { class: 'note' }, 'It is too long for a command, now that it is changed.');
  const copied = make('span', { role: 'status', class: 'note' });
  const code = make('code', {}, value.command.length > 400 ? `${value.command.slice(0, 200)} …` : value.command);
  const details = make('details', { class: 'command' }, make('summary', {}, 'Compute it yourself'),
    make('pre', { tabindex: '0', 'aria-label': 'command' }, code),
    make('p', { class: 'tools' }, button('Copy the command', async () => {
      try {
        await navigator.clipboard.writeText(value.command);
        copied.textContent = 'Copied.';
      } catch { // then the reader copies it by hand
        code.textContent = value.command;
        getSelection().selectAllChildren(code);
        copied.textContent = 'Selected: copy it with your browser.';
      }
    }), value.command.length > 400 ? button('Show it whole', (event) => {
      code.textContent = value.command;
      event.target.remove();
    }) : null, ' ', copied),
    value.command.endsWith(' FILE') ? make('p', { class: 'note' }, 'FILE is the transcript that this page was made of.')
      : null);
  return details;
}

// ---- Refusals, in words

const aside = (who) => (who ? `${NAME[who]}'s screen says` : 'A reader is told');

/** The refusals one after the other. */
function storyList(refusals, here) {
  const items = refusals.slice(0, 6).map(({ frame, by, words, check }) => make('li', {},
    `${by ? `${NAME[by]}'s screen` : 'the reader'} would say `, make('strong', {}, `“${told(check, words)}”`),
    frame && frame !== here ? ` about ${frame.title}` : ''));
  if (refusals.length > 6) items.push(make('li', {}, `and ${refusals.length - 6} more`));
  return make('ol', { class: 'story' }, items);
}

const told = (check, words) => `${check.id === 'cut' ? 'Cut off' : 'Broken off'}: ${words}.`;

function storyBox(refusals, frame) {
  const { refused, refusals: all } = state.reading;
  const first = refusals[0] === refused;
  const receiver = NAME[frame.receiver] ?? 'the reader';
  const parts = [make('h4', {}, first ? 'Refused here' : 'It would be refused here too')];
  if (first) {
    parts.push(make('p', {}, `${aside(refused.by)} `, make('strong', { class: 'words inline' },
      `“${told(refused.check, refused.words)}”`), ' The connection ends, and nothing of it is shown.'));
  }
  const others = first ? all.slice(1) : refusals;
  if (others.length) {
    parts.push(make('p', {}, first ? 'If that check were not there, the next would refuse it, and so on:'
      : 'If nothing before had refused:'), storyList(others, frame));
  }
  if (frame.type === 'TEXT') {
    parts.push(make('p', {}, `Without these checks, ${receiver}'s screen would show:`),
      textBox(frame.text, 'what the text would be'));
  }
  return make('div', { class: 'refusal' }, parts);
}

// ---- Changing bytes

let uids = 0;
const newUid = () => (uids += 1);

/** Give an entry other bytes. What was computed from the old ones is forgotten. */
const withWire = (entry, wire) => ({ tag: entry.tag, uid: entry.uid, from: entry.from, wire });

function choose(uid, at) {
  state.selected = { uid, at };
  refreshCard(uid);
  document.querySelector('.editor input')?.focus();
}

function setByte(uid, at, value) {
  const place = state.entries.findIndex((entry) => entry.uid === uid);
  const entry = state.entries[place];
  const original = state.original[entry.from];
  const wire = Uint8Array.from(entry.wire);
  wire[at] = value;
  const back = same(wire, original.wire);
  state.entries[place] = back ? { ...original, uid } : withWire(entry, wire);
  return recompute();
}

function editor(frame, original) {
  const { uid, at } = state.selected;
  const wire = frame.entry.wire;
  const fieldOf = frame.fields.find(({ start, end }) => at >= start && at < end);
  const byte = wire[at];
  const inside = fieldOf.name === 'ciphertext' && frame.plaintext ? frame.plaintext[at - fieldOf.start] : null;
  const input = make('input', {
    value: byteHex(byte), maxlength: '2', size: '2', autocomplete: 'off', spellcheck: 'false',
    'data-focus': 'editor/value', 'aria-label': 'value, two hexadecimal digits',
    input: (event) => {
      if (/^[0-9a-fA-F]{2}$/.test(event.target.value)) setByte(uid, at, parseInt(event.target.value, 16));
    },
  });
  const bits = [7, 6, 5, 4, 3, 2, 1, 0].map((bit) => {
    const set = Boolean(byte & (1 << bit));
    return button(set ? '1' : '0', () => setByte(uid, at, byte ^ (1 << bit)), {
      class: 'bit', 'aria-pressed': String(set), 'aria-label': `bit ${bit}, worth ${1 << bit}`,
      'data-focus': `editor/${bit}`,
    });
  });
  const back = original && original[at] !== byte
    ? button('Put this byte back', () => setByte(uid, at, original[at])) : null;
  const plain = inside === null ? null : make('p', {}, `It encrypts ${byteHex(inside)}`
    + (inside > 0x20 && inside < 0x7f ? `, “${String.fromCharCode(inside)}”` : '')
    + '. Change a bit here, and the same bit of the plaintext changes.');
  return make('fieldset', { class: 'editor' },
    make('legend', {}, 'Change this byte'), make('p', {}, describeByte(wire, fieldOf, at)), plain,
    make('p', { class: 'tools' }, make('label', {}, 'Value ', input), make('span', { class: 'bits', role: 'group',
      'aria-label': 'bits' }, bits), back, button('Done', () => {
      state.selected = null;
      refreshCard(uid);
    })));
}

function recordTools(frame) {
  const { uid, tag } = frame.entry;
  const place = frame.index;
  const next = state.entries.findIndex((entry, i) => i > place && entry.tag === tag);
  const change = (edit) => () => {
    edit();
    state.selected = null;
    return recompute();
  };
  const swap = () => {
    [state.entries[place], state.entries[next]] = [state.entries[next], state.entries[place]];
  };
  const repeat = () => {
    const again = { ...frame.entry, uid: newUid() };
    state.entries.splice(place + 1, 0, again);
    state.opened.add(again.uid);
  };
  return make('p', { class: 'tools record-tools' }, make('span', {}, 'On the wire:'),
    button('Drop it', change(() => state.entries.splice(place, 1)), { 'data-focus': `drop/${uid}` }),
    button('Repeat it', change(repeat), { 'data-focus': `repeat/${uid}` }),
    next < 0 ? null : button(`Swap with ${NAME[frame.sender]}'s next`, change(swap), { 'data-focus': `swap/${uid}` }));
}

/** What the reader has changed, in words. */
function changes() {
  const said = [];
  let bytes = 0;
  for (const { from, wire } of state.entries) {
    const original = state.original[from].wire;
    if (wire !== original) bytes += wire.reduce((sum, byte, i) => sum + (byte !== original[i]), 0);
  }
  if (bytes) said.push(`${plural(bytes, 'byte')} changed`);
  const times = state.original.map(() => 0);
  state.entries.forEach(({ from }) => (times[from] += 1));
  const dropped = times.filter((count) => count === 0).length;
  const repeated = times.reduce((sum, count) => sum + Math.max(count - 1, 0), 0);
  if (dropped) said.push(`${plural(dropped, 'record')} dropped`);
  if (repeated) said.push(`${plural(repeated, 'record')} repeated`);
  if (state.entries.some(({ from }, i) => i && from < state.entries[i - 1].from)) said.push('records swapped');
  return said.join(', ');
}

// ---- The page as a whole

function verdict() {
  const { frames, refused, lanes } = state.reading;
  const made = frames.reduce((sum, { checks }) => sum + checks.length, 0);
  const box = $('verdict');
  box.className = refused ? 'refused' : 'passed';
  const values = [...state.same.values()];
  const agree = values.filter(Boolean).length;
  const lines = [];
  if (refused) {
    const where = refused.frame ? ` about ${refused.frame.title}` : '';
    lines.push(make('p', { class: 'big' }, mark('refused', 'Refused.')),
      make('p', {}, `${aside(refused.by)}${where}: “${told(refused.check, refused.words)}”`));
  } else {
    lines.push(make('p', { class: 'big' }, mark('passed', `All ${plural(made, 'check')} passed in your browser.`)));
    const wire = frames.reduce((sum, { kind, entry }) => sum + (kind === 'z' ? 0 : entry.wire.length), 0);
    lines.push(make('p', {}, `${plural(frames.length - 1, 'frame')}, ${plural(wire, 'byte')} on the wire.`
      + (values.length ? ` ${agree} of ${plural(values.length, 'value')} came out as the program has them.` : '')
      + (state.reading.closed ? '' : ' There is no goodbye: the connection was cut, or more was said than is here.')));
    if (agree < values.length && !changes()) box.className = 'refused';
  }
  if (!lanes && !refused) lines.push(make('p', {}, 'There is nothing here.'));
  box.replaceChildren(...lines);
}

function keys() {
  const { bob, alice, words } = state.reading;
  const parts = [bob, alice].flatMap((side, i) => (side?.fingerprint ? [make('span', { class: 'key' },
    `${i ? 'Alice' : 'Bob'}: `, make('code', {}, side.fingerprint))] : []));
  if (words) {
    parts.push(make('span', { class: 'key' }, 'Words on Bob\'s screen: ', make('strong', {}, words.slice(0, 3).join(' ')),
      ', on Alice\'s: ', make('strong', {}, words.slice(3).join(' '))));
  }
  $('keys').replaceChildren(...parts);
}

function bubbles() {
  const first = state.reading.refused?.frame;
  const messages = state.reading.frames.filter(({ type }) => type === 'TEXT' || type === 'CLOSE');
  const items = messages.slice(0, state.bubbles).map((frame) => {
    const name = NAME[frame.sender];
    const lost = first && frame.index >= first.index;
    const said = frame.type === 'CLOSE' ? make('p', { class: 'left' }, `${name} left.`)
      : textBox(frame.text, `${name} says`);
    const result = lost ? mark('refused', frame === first ? 'refused' : 'not received any more')
      : mark('passed', 'checked');
    return make('li', { class: `bubble ${frame.sender}${lost ? ' lost' : ''}` },
      make('p', { class: 'who' }, make('strong', {}, name), ' ', result, ' ', goTo(`record ${frame.number}`,
        `frame-${frame.index}`)), said);
  });
  if (messages.length > items.length) {
    items.push(make('li', {}, button(`… ${plural(messages.length - items.length, 'more message')}`, () => {
      state.bubbles += 200;
      bubbles();
    }, { class: 'fold' })));
  }
  if (!messages.length) items.push(make('li', {}, 'Nothing was said.'));
  $('bubbles').replaceChildren(...items);
}

function toggle(uid) {
  if (state.opened.has(uid)) state.opened.delete(uid);
  else state.opened.add(uid);
  refreshCard(uid);
}

/** Draw something again, and leave the reader where they are. */
function keepingFocus(draw) {
  const key = document.activeElement?.dataset?.focus;
  const caret = document.activeElement?.selectionStart;
  draw();
  if (!key) return;
  const again = document.querySelector(`[data-focus="${CSS.escape(key)}"]`);
  again?.focus({ preventScroll: true });
  if (caret !== undefined && caret !== null) again?.setSelectionRange?.(caret, caret);
}

function refreshCard(uid) {
  const frame = state.reading.frames.find(({ entry }) => entry.uid === uid);
  const old = document.querySelector(`[data-uid="${uid}"]`);
  if (frame && old) keepingFocus(() => old.replaceWith(card(frame)));
}

function story() {
  const said = changes();
  $('changes').hidden = !said;
  document.body.classList.toggle('edited', Boolean(said));
  const { refused, refusals } = state.reading;
  if (!said) return $('story').replaceChildren();
  const lines = [make('p', {}, make('strong', {}, `${said}. `), refused
    ? mark('refused', `${aside(refused.by)} “${told(refused.check, refused.words)}”`)
    : mark('passed', 'Nobody refuses it.'))];
  if (refusals.length > 1) {
    lines.push(make('p', { class: 'note' }, `Without that check, ${refusals[1].by ? NAME[refusals[1].by] : 'the reader'} `
      + `would say “${told(refusals[1].check, refusals[1].words)}”`));
  }
  if (refused && said.includes('dropped')) {
    lines.push(make('p', { class: 'note' }, 'The page reads what is left as --verify reads a file. On the wire, whoever '
      + 'waits for a record that was dropped would first go on waiting.'));
  }
  $('see').hidden = !refused?.frame;
  if (refused?.frame) $('see').setAttribute('href', `#frame-${refused.frame.index}`);
  return $('story').replaceChildren(...lines);
}

function draw() {
  keepingFocus(() => {
    verdict();
    keys();
    bubbles();
    $('cards').replaceChildren(...state.reading.frames.map(card));
    story();
    quiz();
  });
}

/** Read everything again, and draw it. The page then carries the number of this run, for whoever waits for it. */
async function recompute() {
  const progress = async (done) => {
    if ($('progress')) $('progress').textContent = `${done} of ${state.entries.length} frames …`;
    await new Promise((resolve) => setTimeout(resolve)); // let the browser breathe
  };
  const job = (state.job = {});
  const reading = await Reading.of({ entries: state.entries, fault: state.fault }, given.words, progress);
  const agreement = await compare(reading);
  if (state.job !== job) return; // something was changed meanwhile
  Object.assign(state, { reading, same: agreement });
  draw();
  state.run += 1;
  document.documentElement.dataset.checked = state.run;
}

/** Compare each value with what the program computed when it made this page. */
async function compare(reading) {
  const found = new Map();
  const program = given.program;
  if (!program) return found;
  const add = (id, value) => {
    if (value === undefined || !(id in program)) return;
    found.set(id, program[id] === (typeof value === 'string' ? value : toHex(value)));
  };
  for (const sender of ['bob', 'alice']) {
    add(`fingerprint-${sender}`, reading[sender]?.fingerprint);
    add(`K-${sender}`, reading.lanes?.[sender].key);
    add(`C-${sender}`, reading.lanes?.[sender].commitment);
  }
  add('th', reading.th);
  add('words', reading.words?.join(' '));
  for (const frame of reading.frames) {
    if (!frame.signed) continue;
    if (frame.sender === 'bob' && frame.commitment) add('commitment', frame.commitment);
    add(`signed-${frame.index}`, frame.signed);
    if (!frame.body) continue;
    const what = [frame.type, toHex(frame.inReplyTo), toHex(await sha256(frame.body))].join(' ');
    add(`plaintext-${frame.index}`, what);
  }
  return found;
}

function restore() {
  state.entries = state.original.map((entry) => ({ ...entry }));
  state.selected = null;
  return recompute();
}

// ---- Questions

function question(id, text, ...parts) {
  const answer = make('p', { class: 'answer', role: 'status' });
  const known = state.answers.get(id);
  if (known) answer.append(mark(known.right ? 'passed' : 'open', known.said));
  return make('div', { class: 'question', id: `question-${id}` }, make('h3', {}, text), parts, answer);
}

function settle(id, right, said) {
  state.answers.set(id, { right, said });
  keepingFocus(quiz);
}

/** A question with a short answer to type. */
function typed(id, text, isRight, explanation, hint) {
  const input = make('input', {
    size: '12', autocomplete: 'off', spellcheck: 'false', 'data-focus': `question/${id}`, 'aria-label': 'your answer',
    value: state.answers.get(id)?.typed ?? '',
  });
  const form = make('form', {
    class: 'tools',
    submit: (event) => {
      event.preventDefault();
      const right = isRight(input.value.trim().toLowerCase());
      settle(id, right, right ? `Right. ${explanation}` : `No. ${hint}`);
      state.answers.get(id).typed = input.value;
      keepingFocus(quiz);
    },
  }, make('label', {}, 'Your answer ', input), make('button', {}, 'Check'));
  return question(id, text, form);
}

function quiz() {
  const { reading } = state;
  const items = [];
  const riddle = state.riddle;
  if (riddle) {
    const now = reading.frames.find(({ entry }) => entry.from === riddle.frame.entry.from);
    const wire = now?.entry.wire;
    const original = state.original[riddle.frame.entry.from].wire;
    const differ = wire ? wire.reduce((sum, byte, i) => sum + (byte !== original[i]), 0) : 0;
    if (now?.text === riddle.text && differ === 1) {
      state.answers.set('bit', { right: true, said: `Right: whoever looks at neither the signature nor the tag reads “${
        riddle.other}”, and Mallory needed no key for it.` });
    }
    items.push(question('bit', `Which bit makes “${riddle.letter}” into “${riddle.other}”?`,
      make('p', {}, 'In ', goTo(riddle.frame.title, `frame-${riddle.frame.index}`), ', change one bit of the '
        + `ciphertext, so that without its checks the text would read “${riddle.other}” instead of the first `
        + `“${riddle.letter}”.`)));
  }
  const last = reading.frames.filter(({ type }) => type === 'TEXT').at(-1);
  const forged = last ?? reading.frames.at(-1);
  if (forged?.sender) items.push(forgery(forged));
  const dropped = state.original.length - state.entries.length;
  if (dropped > 0 && !reading.refused) {
    state.answers.set('drop', { right: true, said: 'Right: a conversation that ends early is still sound. But there is no '
      + 'goodbye, so whoever reads it sees that it was cut.' });
  }
  items.push(question('drop', 'Which record can Mallory drop, and no check refuses?',
    make('p', {}, 'Drop it above, and see.')));
  const alices = state.reading.lanes?.alice?.number ?? 0;
  items.push(typed('nonce', 'What would be the nonce of the next record that Alice sends, as a number?',
    (value) => Number(value) === alices && value !== '', 'Each record raises it by one.',
    'Count Alice\'s records, from 0.'));
  items.push(typed('length', 'How many bytes of text fit into the smallest record?', (value) => value === '222',
    '256 less 1 for the type, 32 for in_reply_to, and 1 for the byte 80.',
    'The plaintext has 256 bytes. Look what else is in there.'));
  $('quiz').replaceChildren(...items);
}

function forgery(frame) {
  const id = 'forge';
  const who = NAME[frame.sender];
  const choices = [
    ['key', `${who}'s private RSA key`, true], ['z', 'Z', true], ['p', 'p and g', false],
    ['rsa', `${who}'s public RSA key`, false], ['words', 'the six words', false],
  ];
  const ticked = state.answers.get(id)?.ticked ?? new Set();
  const boxes = choices.map(([name, label]) => make('label', { class: 'choice' }, make('input', {
    type: 'checkbox', name, checked: ticked.has(name), 'data-focus': `question/${id}/${name}`,
  }), ` ${label}`));
  const form = make('form', {
    submit: (event) => {
      event.preventDefault();
      const chosen = new Set(choices.map(([name]) => name).filter((name) => form.elements[name].checked));
      const right = choices.every(([name, , needed]) => chosen.has(name) === needed);
      settle(id, right, right ? `Right. With Z she makes K, to encrypt, and C, which is signed. With ${who}'s private key she `
        + 'signs. Everything else has been on the wire, or follows from it.'
        : 'Not quite. What does she need to encrypt, and what to sign? And what has she seen on the wire already?');
      state.answers.get(id).ticked = chosen;
      keepingFocus(quiz);
    },
  }, boxes, make('p', { class: 'tools' }, make('button', {}, 'Check')));
  return question(id, `What would Mallory have to find out, to forge ${frame.title}?`,
    make('p', {}, 'She has seen every frame on the wire. Tick what she has to have besides.'), form);
}

// ---- Begin

/** Read a file's bytes: what is refused, and in what words. The tests ask this. */
async function readFile(base64) {
  const reading = await Reading.of(splitFile(fromBase64(base64)), given.words);
  const { refused, words, messages, frames } = reading;
  return { refused: refused?.words ?? null, by: refused?.by ?? null, check: refused?.check.id ?? null,
    words: words?.join(' ') ?? null, messages, frames: frames.length };
}

/** Every command that the page offers, and what it should print. The tests run them. */
async function allCommands() {
  const list = [];
  for (const frame of state.reading.frames) {
    for (const value of valuesOf(state.reading, frame)) {
      const prints = printed(value);
      if (value.command && prints !== null) list.push({ id: value.id, command: value.command, prints });
    }
  }
  return list;
}

async function begin() {
  if (!globalThis.crypto?.subtle) {
    $('verdict').replaceChildren(make('p', {}, 'This browser gives a page from a file no cryptography (crypto.subtle). '
      + 'Please try another one.'));
    return;
  }
  const { entries, fault } = splitFile(fromBase64(given.file));
  state.fault = fault;
  state.original = entries.map((entry, from) => ({ ...entry, from, uid: newUid() }));
  state.entries = state.original.map((entry) => ({ ...entry }));
  state.original.slice(0, OPEN_AT_FIRST).forEach(({ uid }) => state.opened.add(uid));
  $('verdict-of-the-program').append(...given.verdict.map((line) => make('li', {}, line)));
  $('restore').addEventListener('click', restore);
  $('see').addEventListener('click', (event) => {
    event.preventDefault();
    const { frame } = state.reading.refused;
    show(`frame-${frame.index}`);
  });
  const openAll = () => {
    state.entries.slice(0, MANY).forEach(({ uid }) => state.opened.add(uid));
    draw();
  };
  $('open-all').addEventListener('click', openAll);
  $('close-all').addEventListener('click', () => {
    state.opened.clear();
    draw();
  });
  addEventListener('beforeprint', openAll);
  state.riddle = bitRiddle(await Reading.of({ entries: state.entries }, given.words));
  await recompute();
}

begin();
