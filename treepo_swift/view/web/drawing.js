// The tree itself, as SVG. Where things lie is d3-hierarchy's work.

const SVG = 'http://www.w3.org/2000/svg';
const ENDS = {
  answer: ['✓', 'good'], eos: ['■', ''], stop_string: ['■', ''], hook: ['■', ''], repetition: ['↻', 'limit'],
  token_limit: ['▲', 'limit'], context_limit: ['▲', 'limit'], depth_limit: ['▲', 'limit'], failed: ['✕', 'bad'], absent: ['✕', 'bad'],
};
const canvas = document.getElementById('canvas');
const svg = document.getElementById('tree');
let drawn = null; // what was drawn last: { tree, places, groups, scale }

function part(name, attributes, parent) {
  const element = document.createElementNS(SVG, name);
  for (const [key, value] of Object.entries(attributes)) element.setAttribute(key, value);
  if (parent) parent.append(element);
  return element;
}

// Placeholders hang below the node where they ended, as leaves of their own.
function childrenOf(node) {
  if (node.placeholder) return null;
  const lost = node.ends.filter((t) => t.reward === null).map((t) => ({ placeholder: t, id: `lost-${t.number}`, parent: node.id, depth: node.depth + 0.5 }));
  return [...node.children, ...lost];
}

function draw(tree, { zoom }) {
  const root = d3.hierarchy(tree.root, childrenOf);
  const rows = Math.max(1, root.leaves().length);
  const row = Math.max(20, Math.min(46, (canvas.clientHeight - 44) / rows));
  const columns = Math.max(1, root.height);
  const column = Math.max(58, Math.min(170, (canvas.clientWidth - 250) / columns));
  // Every leaf has a row of its own, so that its label has too; what a segment is right of is its depth.
  d3.cluster().nodeSize([row, column]).separation(() => 1)(root);
  const places = root.descendants();
  for (const place of places) place.y = place.depth * column;
  const top = Math.min(...places.map((p) => p.x)), bottom = Math.max(...places.map((p) => p.x));
  const right = Math.max(...places.map((p) => p.y));
  const [width, height] = [right + 240, bottom - top + 44];
  svg.replaceChildren();
  // Dots and labels lie above all edges.
  const layers = [part('g', {}, svg), part('g', {}, svg)];
  svg.setAttribute('viewBox', `-24 ${top - 22} ${width} ${height}`);
  drawn = { tree, places, groups: new Map(), width, height, most: Math.max(1, ...tree.nodes.map((node) => node.count)) };
  zoomTo(zoom);
  for (const place of places) drawNode(place, layers);
  return drawn;
}

function zoomTo(zoom) {
  if (!drawn) return;
  svg.setAttribute('width', drawn.width * zoom);
  svg.setAttribute('height', drawn.height * zoom);
}

// The zoom at which the whole tree is seen, but no larger than it is.
function fittingZoom() {
  if (!drawn) return 1;
  return Math.max(0.25, Math.min(1, canvas.clientWidth / drawn.width, canvas.clientHeight / drawn.height));
}

function drawNode(place, layers) {
  const node = place.data;
  const [below, group] = layers.map((layer) => part('g', { class: kindOf(place), 'data-node': node.id }, layer));
  drawn.groups.set(node.id, [below, group]);
  if (place.parent) {
    const from = place.parent, half = (from.y + place.y) / 2;
    const line = `M${from.y},${from.x}C${half},${from.x} ${half},${place.x} ${place.y},${place.x}`;
    const width = node.placeholder ? 1.5 : 2 + 9 * Math.sqrt(node.count / drawn.most);
    part('path', { class: 'halo', d: line, 'stroke-width': width + 9 }, below);
    part('path', { class: 'edge', d: line, 'stroke-width': width.toFixed(1) }, below);
    part('path', { class: 'hit', d: line }, below);
    if (!node.placeholder) tip(below, nodeTip(node));
  }
  if (node.placeholder) return drawEnd(group, place, node.placeholder);
  part('circle', { class: 'dot', cx: place.y, cy: place.x, r: place.parent ? (node.children.length > 1 ? 4.5 : 3) : 6 }, group);
  if (node.fallback) {
    const [x, y] = [(place.parent.y + place.y) / 2, (place.parent.x + place.x) / 2];
    const from = node.fallback.fallbackFrom;
    part('path', { class: 'diamond', d: `M${x - 6},${y}l6,-6l6,6l-6,6Z` }, group);
    tip(group, `fallback: branched ${from < 0 ? 'from the prompt' : `from answer #${from + 1}, which had ended`}`);
  }
  const whole = node.ends.filter((t) => t.reward !== null);
  if (whole.length) drawEnd(group, place, whole[0], whole.length);
  tip(group, nodeTip(node));
}

function kindOf(place) {
  const node = place.data;
  if (node.placeholder) return 'node failed';
  return ['node', node.root ? 'root' : '', node.environment ? 'environment' : '', node.children && node.children.length > 1 ? 'fork' : ''].join(' ');
}

function drawEnd(group, place, trajectory, count = 1) {
  const [glyph, kind] = ENDS[trajectory.stop] || ['?', ''];
  const text = part('text', { x: place.y + 10, y: place.x + 4 }, group);
  const mark = part('tspan', { class: `end ${kind}` }, text);
  mark.textContent = glyph;
  const label = part('tspan', { dx: 6 }, text);
  if (trajectory.reward === null) {
    label.textContent = plain(`${trajectory.stop}${trajectory.error ? `: ${trajectory.error}` : ''}`, 38);
    tip(group, plain(`answer #${trajectory.number + 1} ${trajectory.stop}: ${trajectory.error || 'nothing could grow here'}`, 600));
  } else {
    label.textContent = `${number(trajectory.reward)}`;
    label.setAttribute('class', 'reward');
    part('tspan', { dx: 7 }, text).textContent = `#${trajectory.number + 1} ${ended(trajectory.stop)}${count > 1 ? ` (and ${count - 1} more)` : ''}`;
  }
}

function ended(stop) {
  return stop.replace('_', ' ');
}

function tip(group, text) {
  const title = part('title', {}, group);
  title.textContent = text;
}

function nodeTip(node) {
  if (node.root) return 'the prompt';
  const what = node.environment ? 'environment' : 'segment';
  const forks = node.children.length > 1 ? `\nforks into ${node.children.length}` : '';
  return `${what} ${node.id}, depth ${node.depth}, ${node.count} tokens, ${node.size} answers${forks}\n${plain(node.text, 160)}`;
}

// Edges in the chosen colour. Nothing is laid out again.
function paint({ colour, estimator }) {
  const scale = scaleOf(drawn.tree, colour, estimator);
  for (const place of drawn.places) {
    const node = place.data;
    if (!place.parent || node.placeholder) continue;
    const edge = drawn.groups.get(node.id)[0].querySelector('.edge');
    edge.style.stroke = node.environment ? 'var(--faint)' : scale.colour(measure(drawn.tree, node, colour, estimator));
  }
  document.getElementById('low').textContent = scale.low;
  document.getElementById('high').textContent = scale.high;
  document.getElementById('ramp').style.background = scale.ramp;
}

// The chosen node, the path to it, and the nodes in which the searched text is.
function highlight(chosen, query) {
  const onPath = new Set(pathTo(drawn.tree, chosen).map((node) => node.id));
  for (const [id, groups] of drawn.groups) {
    const node = drawn.tree.byId.get(id);
    const found = Boolean(query && node && node.text && node.text.toLowerCase().includes(query));
    for (const group of groups) {
      group.classList.toggle('on-path', onPath.has(id));
      group.classList.toggle('chosen', id === chosen);
      group.classList.toggle('found', found);
    }
  }
  keepInView(drawn.groups.get(chosen)[1]);
}

function keepInView(group) {
  const dot = group.querySelector('.dot');
  if (!dot) return;
  const box = dot.getBoundingClientRect(), view = canvas.getBoundingClientRect();
  if (box.left < view.left + 20 || box.right > view.right - 60) canvas.scrollLeft += box.left - view.left - view.width / 2;
  if (box.top < view.top + 10 || box.bottom > view.bottom - 10) canvas.scrollTop += box.top - view.top - view.height / 2;
}

// The node next to the chosen one, for the arrow keys.
function neighbour(chosen, key) {
  const places = drawn.places.filter((place) => !place.data.placeholder);
  const here = places.find((place) => place.data.id === chosen);
  if (!here) return 0;
  if (key === 'ArrowLeft') return here.parent ? here.parent.data.id : chosen;
  if (key === 'ArrowRight') return here.data.children.length ? here.data.children[0].id : chosen;
  const same = places.filter((place) => place.depth === here.depth).sort((a, b) => a.x - b.x);
  const next = same[same.indexOf(here) + (key === 'ArrowDown' ? 1 : -1)];
  return next ? next.data.id : chosen;
}
