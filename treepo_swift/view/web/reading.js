// Texts and tables below the tree. Whatever a model said is only ever set as textContent.

const panel = document.getElementById('panel');
const tokenLine = document.getElementById('token-line');
// Nothing that turns the direction of text, hides in it, or controls a terminal is left as it is.
const ODD = /[\u0000-\u0008\u000b-\u001f\u007f-\u009f\u061c\u200b\u200e\u200f\u2028-\u202e\u2060-\u206f\ufeff]/gu;

function make(name, className, text) {
  const element = document.createElement(name);
  if (className) element.className = className;
  if (text !== undefined) element.textContent = text;
  return element;
}

function code(character) {
  return `U+${character.codePointAt(0).toString(16).toUpperCase().padStart(4, '0')}`;
}

// One short line of a text.
function plain(text, most) {
  const line = text.replace(/\s+/gu, ' ').replace(ODD, (c) => `⟨${code(c)}⟩`).trim();
  return line.length > most ? `${line.slice(0, most)}…` : line;
}

function visible(text) {
  return text.replace(/ /gu, '·').replace(/\n/gu, '↵\n').replace(/\t/gu, '⇥\t').replace(/\u00a0/gu, '⍽').replace(/[\u200c\u200d]/gu, '∅');
}

// Where in a text the searched one is: [begin, end] of each.
function matches(text, query) {
  const lower = text.toLowerCase();
  const found = [];
  // toLowerCase may change a text's length; then nothing is marked, which hides nothing.
  if (!query || lower.length !== text.length) return found;
  for (let at = lower.indexOf(query); at >= 0; at = lower.indexOf(query, at + query.length)) found.push([at, at + query.length]);
  return found;
}

// A text into an element: odd characters named, and what of it lies in `marks` marked. It begins at `start` of the
// text that the marks are of.
function write(element, text, { whitespace, marks = [], start = 0 }) {
  const end = start + text.length;
  let at = start;
  for (const [from, to] of marks) {
    if (to <= at || from >= end) continue;
    writeShown(element, text.slice(at - start, Math.max(from, at) - start), whitespace);
    const mark = make('mark');
    writeShown(mark, text.slice(Math.max(from, at) - start, Math.min(to, end) - start), whitespace);
    element.append(mark);
    at = Math.min(to, end);
  }
  writeShown(element, text.slice(at - start), whitespace);
}

function writeShown(element, text, whitespace) {
  let at = 0;
  for (const odd of text.matchAll(ODD)) {
    element.append(shown(text.slice(at, odd.index), whitespace), make('span', 'odd', code(odd[0])));
    at = odd.index + odd[0].length;
  }
  element.append(shown(text.slice(at), whitespace));
}

function shown(text, whitespace) {
  return whitespace ? visible(text) : text;
}

function writeNode(block, node, start, options) {
  if (!node.logprobs && !node.entropies) {
    write(block, node.text, { ...options, start });
    return;
  }
  let at = 0;
  node.pieces.forEach((length, token) => {
    if (!length) return;
    const span = make('span', 'token');
    const heat = heatOf(node, token, options.heat);
    if (heat) span.style.background = heat;
    span.dataset.token = token;
    write(span, node.text.slice(at, at + length), { ...options, start: start + at });
    block.append(span);
    at += length;
  });
}

// Tab "Text": the prompt, and the path to the chosen node.
function showText(tree, chosen, options) {
  const box = make('div', 'text');
  const prompt = make('span', 'part of-prompt');
  write(prompt, tree.prompt, { ...options, marks: matches(tree.prompt, options.query) });
  box.append(prompt);
  const path = pathTo(tree, chosen);
  const marks = matches(path.map((node) => node.text).join(''), options.query);
  let start = 0;
  for (const node of path) {
    const block = make('span', `part ${node.environment ? 'environment' : ''} ${node.id === chosen ? 'chosen' : ''}`);
    block.dataset.node = node.id;
    const where = make('span', 'where', node.id);
    const trained = node.trained === undefined ? '' : `, ${node.trained} of them trained on`;
    where.title = `${node.environment ? 'environment' : 'segment'} ${node.id}, ${node.count} tokens${trained}`;
    block.append(where);
    writeNode(block, node, start, { ...options, marks });
    start += node.text.length;
    box.append(block);
  }
  panel.append(box);
  const last = path[path.length - 1];
  if (last && last.children.length) panel.append(make('div', 'note', `Goes on in ${last.children.length} ${last.children.length > 1 ? 'branches' : 'segment'}: → follows the first.`));
  const block = box.querySelector('.part.chosen');
  if (block) panel.scrollTop = Math.max(0, block.offsetTop - panel.offsetTop - 60);
}

// Tab "Compare": two answers from the fork at which they part.
function showCompare(tree, chosen, options, other, choose) {
  const one = through(tree, tree.byId.get(chosen))[0];
  const rest = tree.trajectories.filter((t) => t !== one && t.reward !== null);
  if (!one || one.reward === null || !rest.length) {
    panel.append(make('div', 'note', 'There is no other answer to compare with.'));
    return;
  }
  const mine = pathTo(tree, one.leaf);
  const shared = (t) => {
    const path = pathTo(tree, t.leaf);
    let same = 0;
    while (same < path.length && same < mine.length && path[same] === mine[same]) same += 1;
    return same;
  };
  // The nearest answers first, and of these the one with the most different reward.
  const near = rest.map((t) => [t, shared(t)]).sort((a, b) => b[1] - a[1] || Math.abs(b[0].reward - one.reward) - Math.abs(a[0].reward - one.reward));
  const [twin, fork] = near.find(([t]) => t.number === other) || near[0];
  const line = make('div', 'note');
  line.append(`Answer #${one.number + 1} against `);
  const select = make('select');
  for (const [t, same] of near) {
    const option = make('option', '', `#${t.number + 1}, reward ${number(t.reward)}, shares ${same} nodes`);
    option.value = t.number;
    option.selected = t === twin;
    select.append(option);
  }
  select.addEventListener('change', () => choose(Number(select.value)));
  const common = mine.slice(0, fork).reduce((sum, node) => sum + node.count, 0);
  line.append(select, fork ? ` from the fork after segment ${mine[fork - 1].id}: ${counted(common)} tokens are the same and were decoded once.` : ' from the prompt: they share nothing.');
  panel.append(line);
  const textOf = (t) => pathTo(tree, t.leaf).slice(fork).map((node) => node.text).join('');
  const [left, right] = [textOf(one), textOf(twin)];
  const parts = Diff.diffWordsWithSpace(left, right, { timeout: 400 });
  const columns = make('div', 'columns');
  for (const [t, text, skip, kind] of [[one, left, 'added', 'only-left'], [twin, right, 'removed', 'only-right']]) {
    const column = make('div');
    column.append(make('h3', '', `#${t.number + 1} · reward ${number(t.reward)} · advantage ${signed(t.advantage)} · ${ended(t.stop)}`));
    const box = make('div', 'text');
    if (!parts) write(box, text, options);
    for (const piece of parts || []) {
      if (piece[skip]) continue;
      const span = make('span', piece.added || piece.removed ? kind : '');
      write(span, piece.value, options);
      box.append(span);
    }
    column.append(box);
    columns.append(column);
  }
  panel.append(columns);
  if (!parts) panel.append(make('div', 'note', 'Too different to compare word by word.'));
}

// Tab "Subgroups": how the advantage of an answer comes out.
function showSubgroups(tree, chosen) {
  const one = through(tree, tree.byId.get(chosen))[0];
  if (!one || one.reward === null) {
    panel.append(make('div', 'note', 'No answer goes through here.'));
    return;
  }
  panel.append(make('div', 'note', `Answer #${one.number + 1}, reward ${number(one.reward, 4)}, against every subgroup that it belongs to. As trained, by ${tree.estimator} and ${tree.normalisation}: ${signed(one.advantage, 4)}.`));
  const nodes = [tree.root, ...pathTo(tree, one.leaf).filter((node) => !node.environment)];
  const rows = nodes.map((node, j) => {
    const counts = j === 0 || node.size > 1;
    return [j === 0 ? 'the tree' : `segment ${node.id}`, node.size, number(node.value, 4), counts ? signed(one.reward - node.value, 4) : '–', counts ? '' : 'alone: says nothing'];
  });
  const gaps = nodes.filter((node, j) => j === 0 || node.size > 1).map((node) => one.reward - node.value);
  rows.push(['mean over depths (Eq. 5)', '', '', signed(mean(gaps), 4), 'before normalisation']);
  table(['subgroup', 'answers', 'mean reward', 'reward − mean', ''], rows, [1, 2, 3]);
  const last = nodes[nodes.length - 1];
  panel.append(make('div', 'note', 'The last segment by each estimator:'));
  table(['estimator', 'value'], index.estimators.map((name) => [name, signed((tree.advantages[name] || [])[last.position] ?? null, 3)]), [1]);
}

// Tab "Answers": all trajectories.
function showAnswers(tree, chosen, choose) {
  const names = [...new Set(tree.trajectories.flatMap((t) => Object.keys(t.rewards)))];
  const onPath = new Set(through(tree, tree.byId.get(chosen)));
  const several = names.length > 1 ? names : [];
  const head = ['#', 'stop', 'reward', ...several, 'advantage', 'tokens', 'fallback', 'ends with'];
  const rows = tree.trajectories.map((t) => [
    t.number + 1, ended(t.stop), number(t.reward), ...several.map((name) => number(t.rewards[name] ?? null)), signed(t.advantage), counted(t.tokens),
    t.fallbackFrom === undefined ? '' : t.fallbackFrom < 0 ? 'from the prompt' : `from #${t.fallbackFrom + 1}`,
    plain(t.error || pathTo(tree, t.leaf).map((node) => node.text).join('').slice(-300), 300).slice(-90),
  ]);
  const body = table(head, rows, [0, 2, ...several.map((_, i) => 3 + i), 3 + several.length, 4 + several.length]);
  [...body.rows].forEach((row, number) => {
    const trajectory = tree.trajectories[number];
    row.className = `pick ${onPath.has(trajectory) ? 'chosen' : ''}`;
    row.addEventListener('click', () => choose(trajectory.leaf));
  });
}

// Tab "Facts": what growing it took.
function showFacts(tree) {
  const { summary } = tree;
  const rows = [
    ['tree', summary.id], ['step', `${summary.step} (${summary.mode})`], ['run began', tree.run],
    ['advantages', `${tree.estimator}, ${tree.normalisation}`],
    ['decoded tokens in this picture', counted(summary.decoded)],
    ['the same answers one by one', counted(summary.independent)],
    ...Object.entries(tree.stats).map(([key, value]) => [key.replaceAll('_', ' '), counted(value)]),
  ];
  table(['', ''], rows, []);
}

function table(head, rows, numbers) {
  const element = make('table');
  if (head.some(Boolean)) {
    const line = element.createTHead().insertRow();
    head.forEach((text, i) => line.append(make('th', numbers.includes(i) ? 'number' : '', text)));
  }
  const body = element.createTBody();
  for (const row of rows) {
    const line = body.insertRow();
    row.forEach((text, i) => line.append(make('td', numbers.includes(i) ? 'number' : '', text)));
  }
  panel.append(element);
  return body;
}

function tellToken(tree, span) {
  const block = span && span.closest('[data-node]');
  if (!block) { tokenLine.textContent = ''; return; }
  const node = tree.byId.get(Number(block.dataset.node)), at = Number(span.dataset.token);
  const facts = [`token ${node.tokens[at]}  ${JSON.stringify(span.textContent)}`];
  if (node.logprobs) facts.push(`log-prob ${number(node.logprobs[at])} (${(100 * Math.exp(node.logprobs[at])).toFixed(1)} %)`);
  if (node.entropies) facts.push(`entropy ${number(node.entropies[at])}`);
  tokenLine.textContent = facts.join('   ');
}
