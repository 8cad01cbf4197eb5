// The list of trees: filters, order, search.

const list = document.getElementById('list');
const count = document.getElementById('count');
const field = (id) => document.getElementById(id);
let listed = []; // positions in the index, in the order of the list
let rows = new Map(); // position -> its row
let query = '';
let hits = null; // positions with the searched text; null where nothing is searched
let searching = 0;

function contrast(summary) {
  return summary.low === null ? 0 : summary.high - summary.low;
}

function fillFilters() {
  const option = (select, value, text) => { const o = make('option', '', text); o.value = value; select.append(o); };
  const steps = new Set(index.trees.map((t) => (t.mode === 'train' ? String(t.step) : `${t.step} ${t.mode}`)));
  option(field('by-step'), '', 'all');
  for (const step of steps) option(field('by-step'), step, step);
  const stops = new Set(index.trees.flatMap((t) => Object.keys(t.stops)));
  option(field('by-stop'), '', 'any');
  for (const stop of [...stops].sort()) option(field('by-stop'), stop, ended(stop));
  for (const name of index.estimators) option(field('estimator'), name, name);
}

function isWanted(summary, position) {
  const step = field('by-step').value, stop = field('by-stop').value, flat = field('by-contrast').value;
  if (step && (summary.mode === 'train' ? String(summary.step) : `${summary.step} ${summary.mode}`) !== step) return false;
  if (stop && !summary.stops[stop]) return false;
  if (flat && (contrast(summary) > 0) !== (flat === 'some')) return false;
  if (field('by-failed').checked && !summary.failed && !summary.troubles) return false;
  if (field('by-fallback').checked && !summary.fallbacks) return false;
  return hits === null || hits.has(position);
}

const ORDERS = {
  step: () => 0,
  contrast: (a, b) => contrast(b) - contrast(a),
  best: (a, b) => (b.value ?? -Infinity) - (a.value ?? -Infinity),
  worst: (a, b) => (a.value ?? Infinity) - (b.value ?? Infinity),
  reused: (a, b) => reused(b) - reused(a),
};

function reused(summary) {
  return summary.independent ? 1 - summary.decoded / summary.independent : 0;
}

function filter() {
  const order = ORDERS[field('sort').value];
  listed = index.trees.map((_, position) => position).filter((p) => isWanted(index.trees[p], p));
  listed.sort((a, b) => order(index.trees[a], index.trees[b]) || a - b);
  rows = new Map(listed.map((position) => [position, rowOf(position)]));
  list.replaceChildren(...rows.values());
  const all = index.trees.length;
  const more = searching ? ', searching …' : '';
  count.textContent = `${listed.length === all ? counted(all) : `${counted(listed.length)} of ${counted(all)}`} trees${more}`;
}

function rowOf(position) {
  const summary = index.trees[position];
  const row = make('li');
  row.dataset.position = position;
  row.append(make('span', 'what', plain(index.prompts[summary.prompt], 120) || '(empty prompt)'));
  const badges = make('span', 'badges');
  if (summary.failed || summary.troubles) badges.append(make('span', 'badge bad', `✕ ${summary.failed || summary.troubles}`));
  if (summary.fallbacks) badges.append(make('span', 'badge fallback', `◆ ${summary.fallbacks}`));
  if (contrast(summary) === 0) badges.append(make('span', 'badge', 'flat'));
  row.append(badges);
  const share = make('span', 'share');
  share.append(make('span', 'when', `${summary.mode === 'train' ? 'step' : summary.mode} ${summary.step}`));
  const meter = make('span', 'meter');
  const level = make('i');
  const [low, high] = [Math.min(0, summary.low ?? 0), Math.max(1, summary.high ?? 1)];
  level.style.width = `${(100 * ((summary.value ?? low) - low)) / (high - low)}%`;
  meter.append(level);
  share.append(meter, make('span', '', `${number(summary.value)} mean`), make('span', 'when', `${Math.round(100 * reused(summary))} % reused`));
  row.append(share);
  return row;
}

function mark(position) {
  for (const row of list.querySelectorAll('.chosen')) row.classList.remove('chosen');
  const row = rows.get(position);
  if (row) {
    row.classList.add('chosen');
    row.scrollIntoView({ block: 'nearest' });
  }
}

// Looks through all texts, a slice at a time, so that the page stays alive. Returns once all are seen, or a newer
// search has begun.
async function search(text, changed) {
  query = text.toLowerCase();
  searching += 1;
  const mine = searching;
  hits = query ? new Set() : null;
  let told = performance.now();
  for (let position = 0; query && position < packed.length - 1; position += 1) {
    if ((await searchText(position)).includes(query)) hits.add(position);
    if (mine !== searching) return;
    if (performance.now() - told > 250) {
      filter();
      told = performance.now();
    }
  }
  searching = 0;
  filter();
  changed();
}
