// What is chosen, and everything that changes it: clicks, keys, the address.

const TABS = ['text', 'compare', 'subgroups', 'answers', 'facts'];
const state = { position: -1, node: 0, colour: 'advantage', estimator: index.estimators[0], tab: 'text', other: -1, zoom: 1 };
let tree = null;

const positionOf = new Map(index.trees.map((summary, position) => [summary.id, position]).reverse());

async function chooseTree(position, node = 0) {
  if (position < 0 || position >= index.trees.length) return;
  state.position = position;
  state.other = -1;
  mark(position);
  const found = await treeAt(position);
  if (state.position !== position) return; // another was chosen meanwhile
  tree = found;
  const first = through(tree, tree.root).find((t) => t.reward !== null);
  state.node = tree.byId.has(node) && node ? node : first ? first.leaf : 0;
  showHead();
  draw(tree, state);
  state.zoom = fittingZoom();
  zoomTo(state.zoom);
  paint(state);
  chooseNode(state.node);
}

function chooseNode(node) {
  state.node = node;
  highlight(node, query);
  showNodeLine();
  showPanel();
  writeAddress();
}

function showHead() {
  const summary = index.trees[state.position];
  field('prompt-line').textContent = plain(index.prompts[summary.prompt], 200) || '(empty prompt)';
  const stops = Object.entries(summary.stops).map(([stop, n]) => `${n} × ${ended(stop)}`).join(', ');
  const chips = field('chips');
  chips.replaceChildren();
  const chip = (name, value) => {
    const span = make('span');
    span.append(make('b', '', value), ` ${name}`);
    chips.append(span);
  };
  chip('answers', counted(summary.width));
  chip('mean reward', number(summary.value));
  chip('tokens decoded', counted(summary.decoded));
  chip(`reused (${Math.round(100 * reused(summary))} %)`, counted(summary.independent - summary.decoded));
  chips.append(make('span', '', stops));
  const same = samePrompt();
  const slider = field('step-slider');
  slider.max = Math.max(0, same.length - 1);
  slider.value = same.indexOf(state.position);
  slider.disabled = same.length < 2;
  field('steps').classList.toggle('single', same.length < 2);
  field('step-now').textContent = `${summary.step}${same.length > 1 ? ` (${same.indexOf(state.position) + 1} of ${same.length})` : ''}`;
}

// Trees of the same prompt, by step.
function samePrompt() {
  const { prompt } = index.trees[state.position];
  return index.trees.map((_, p) => p).filter((p) => index.trees[p].prompt === prompt).sort((a, b) => index.trees[a].step - index.trees[b].step || a - b);
}

function showNodeLine() {
  const line = field('node-line'), node = tree.byId.get(state.node);
  line.replaceChildren();
  if (node.root) {
    line.append(make('b', '', 'The prompt'), ` · ${node.size} answers, mean reward ${number(node.value)}`);
    return;
  }
  const facts = [`depth ${node.depth}`, `${counted(node.count)} ${node.count === 1 ? 'token' : 'tokens'}`];
  if (!node.environment) {
    facts.push(node.size > 1 ? `decoded once for ${node.size} answers (${counted(node.count * (node.size - 1))} reused)` : 'decoded for one answer');
    facts.push(`mean reward ${number(node.value)}`, `advantage ${signed((tree.advantages[state.estimator] || [])[node.position] ?? null)} (${state.estimator})`);
    facts.push(`log-prob ${number(node.logprob)}`);
    if (node.entropy !== null) facts.push(`entropy ${number(node.entropy)}`);
  }
  line.append(make('b', '', `${node.environment ? 'Environment' : 'Segment'} ${node.id}`), ` · ${facts.join(' · ')}`);
  if (node.fallback) {
    const from = node.fallback.fallbackFrom;
    line.append(' · ', make('span', 'fallback', `◆ begins a fallback ${from < 0 ? 'from the prompt' : `from answer #${from + 1}`}`));
  }
  for (const t of node.ends.filter((t) => t.reward === null)) line.append(' · ', make('span', 'bad', plain(`✕ ${t.stop}: ${t.error || ''}`, 200)));
}

function showPanel() {
  panel.replaceChildren();
  panel.scrollTop = 0;
  tokenLine.textContent = '';
  for (const button of document.querySelectorAll('#tabs button')) button.classList.toggle('chosen', button.dataset.tab === state.tab);
  const options = { heat: field('heat').value, whitespace: field('whitespace').checked, query };
  const pick = (leaf) => { state.tab = 'text'; chooseNode(leaf); };
  if (state.tab === 'text') showText(tree, state.node, options);
  if (state.tab === 'compare') showCompare(tree, state.node, options, state.other, (other) => { state.other = other; showPanel(); });
  if (state.tab === 'subgroups') showSubgroups(tree, state.node);
  if (state.tab === 'answers') showAnswers(tree, state.node, pick);
  if (state.tab === 'facts') showFacts(tree);
}

// The address names what is shown.
function writeAddress() {
  const parts = new URLSearchParams({ tree: index.trees[state.position].id, node: state.node, colour: state.colour, tab: state.tab });
  if (state.estimator !== index.estimators[0]) parts.set('estimator', state.estimator);
  if (query) parts.set('search', query);
  history.replaceState(null, '', `#${parts}`);
}

async function readAddress() {
  const parts = new URLSearchParams(location.hash.slice(1));
  const known = (value, values, otherwise) => (values.includes(value) ? value : otherwise);
  state.colour = known(parts.get('colour'), COLOURS, state.colour);
  state.estimator = known(parts.get('estimator'), index.estimators, state.estimator);
  state.tab = known(parts.get('tab'), TABS, state.tab);
  field('colour').value = state.colour;
  field('estimator').value = state.estimator;
  const position = positionOf.get(parts.get('tree')) ?? listed[0] ?? 0;
  await chooseTree(position, Number(parts.get('node')));
  const text = parts.get('search') || '';
  if (text.toLowerCase() !== query) {
    field('search').value = text;
    await search(text, refresh);
  }
}

function refresh() {
  mark(state.position);
  if (tree) chooseNode(state.node);
}

function repaint() {
  state.colour = field('colour').value;
  state.estimator = field('estimator').value;
  field('estimator-label').hidden = state.colour !== 'advantage';
  paint(state);
  showNodeLine();
  writeAddress();
}

function step(by) {
  const at = listed.indexOf(state.position);
  const next = listed[at < 0 ? 0 : Math.min(listed.length - 1, Math.max(0, at + by))];
  if (next !== undefined && next !== state.position) chooseTree(next);
}

function stepPrompt(by) {
  const same = samePrompt();
  const next = same[same.indexOf(state.position) + by];
  if (next !== undefined) chooseTree(next);
}

function cycle(id) {
  const select = field(id);
  select.selectedIndex = (select.selectedIndex + 1) % select.options.length;
}

function zoomBy(factor) {
  state.zoom = Math.min(3, Math.max(0.2, factor ? state.zoom * factor : fittingZoom()));
  zoomTo(state.zoom);
}

function toggleTheme() {
  const root = document.documentElement;
  const dark = root.dataset.theme ? root.dataset.theme === 'dark' : matchMedia('(prefers-color-scheme: dark)').matches;
  root.dataset.theme = dark ? 'light' : 'dark';
}

const KEYS = {
  j: () => step(1), k: () => step(-1), ']': () => stepPrompt(1), '[': () => stepPrompt(-1),
  c: () => { cycle('colour'); repaint(); }, e: () => { cycle('estimator'); repaint(); },
  w: () => { field('whitespace').checked = !field('whitespace').checked; showPanel(); },
  h: () => { cycle('heat'); showPanel(); },
  '+': () => zoomBy(1.2), '=': () => zoomBy(1.2), '-': () => zoomBy(1 / 1.2), 0: () => zoomBy(0),
  d: toggleTheme, '?': () => field('help').showModal(), '/': () => field('search').select(),
  ...Object.fromEntries(TABS.map((tab, i) => [i + 1, () => { state.tab = tab; showPanel(); writeAddress(); }])),
};

document.addEventListener('keydown', (event) => {
  if (event.key === 'Escape' && event.target === field('search')) { event.target.blur(); return; }
  if (event.ctrlKey || event.metaKey || event.altKey || field('help').open || event.target.closest('input:not([type=checkbox]):not([type=range]), select')) return;
  if (event.key.startsWith('Arrow') && tree && !event.target.closest('#panel, input')) {
    event.preventDefault();
    chooseNode(neighbour(state.node, event.key));
  } else if (KEYS[event.key] && (tree || event.key === '?')) {
    event.preventDefault();
    KEYS[event.key]();
  }
});

let waiting = 0;
field('search').addEventListener('input', (event) => {
  clearTimeout(waiting);
  waiting = setTimeout(() => search(event.target.value, refresh), 200);
});
field('filters').addEventListener('submit', (event) => event.preventDefault());
field('filters').addEventListener('change', (event) => {
  // The search field says `change` when a click leaves it; a list made anew under the mouse would lose that click.
  if (event.target === field('search')) return;
  filter();
  mark(state.position);
});
field('filters').addEventListener('reset', () => setTimeout(() => search('', refresh)));
list.addEventListener('click', (event) => {
  const row = event.target.closest('li');
  if (row) chooseTree(Number(row.dataset.position));
});
svg.addEventListener('click', (event) => {
  const group = event.target.closest('.node');
  if (!group) return;
  const id = group.dataset.node;
  chooseNode(id.startsWith('lost-') ? tree.trajectories[Number(id.slice(5))].leaf : Number(id));
});
canvas.addEventListener('wheel', (event) => {
  if (!event.ctrlKey) return;
  event.preventDefault();
  zoomBy(event.deltaY < 0 ? 1.1 : 1 / 1.1);
}, { passive: false });
panel.addEventListener('mouseover', (event) => tellToken(tree, event.target.closest('.token')));
panel.addEventListener('click', (event) => {
  const where = event.target.closest('.where');
  const block = where && where.closest('[data-node]');
  if (block) chooseNode(Number(block.dataset.node));
});
field('tabs').addEventListener('click', (event) => {
  if (event.target.dataset.tab) { state.tab = event.target.dataset.tab; showPanel(); writeAddress(); }
});
for (const id of ['heat', 'whitespace']) field(id).addEventListener('change', showPanel);
for (const id of ['colour', 'estimator']) field(id).addEventListener('change', repaint);
field('step-slider').addEventListener('input', (event) => chooseTree(samePrompt()[Number(event.target.value)]));
field('smaller').addEventListener('click', () => zoomBy(1 / 1.2));
field('larger').addEventListener('click', () => zoomBy(1.2));
field('fit').addEventListener('click', () => zoomBy(0));
field('theme').addEventListener('click', toggleTheme);
field('help-open').addEventListener('click', () => field('help').showModal());
addEventListener('hashchange', readAddress);

if (!document.documentElement.dataset.theme && matchMedia('(prefers-color-scheme: dark)').matches) document.documentElement.dataset.theme = 'dark';
field('source').textContent = index.source;
fillFilters();
filter();
if (index.trees.length) {
  readAddress().then(() => { repaint(); document.documentElement.dataset.ready = 'yes'; });
} else {
  panel.append(make('div', 'empty', 'There are no trees in this file.'));
  document.documentElement.dataset.ready = 'yes';
}
