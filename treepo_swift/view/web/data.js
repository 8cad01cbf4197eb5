// The trees: a small index of all of them, and each one unpacked when it is asked for.

const index = JSON.parse(document.getElementById('index').textContent);
const packed = document.getElementById('trees').textContent.split('\n');
document.getElementById('trees').remove(); // it may be large, and is not needed twice

const KEPT = 24;
const unpacked = new Map(); // position -> Promise of a tree, the latest last

function bytesOf(text) {
  if (Uint8Array.fromBase64) return Uint8Array.fromBase64(text);
  const raw = atob(text);
  const bytes = new Uint8Array(raw.length);
  for (let i = 0; i < raw.length; i += 1) bytes[i] = raw.charCodeAt(i);
  return bytes;
}

async function unpack(position) {
  const stream = new Blob([bytesOf(packed[position])]).stream().pipeThrough(new DecompressionStream('deflate-raw'));
  return new Response(stream).json();
}

function treeAt(position) {
  let tree = unpacked.get(position);
  unpacked.delete(position);
  tree = tree || unpack(position).then((values) => connected(values, index.trees[position]));
  unpacked.set(position, tree);
  if (unpacked.size > KEPT) unpacked.delete(unpacked.keys().next().value);
  return tree;
}

// Children, paths and the numbers that colours and lines show, worked out once a tree.
function connected(tree, summary) {
  const root = { id: 0, parent: null, depth: 0, children: [], size: summary.width - summary.failed, value: summary.value, root: true };
  const byId = new Map([[0, root]]);
  tree.nodes.forEach((node, position) => {
    node.position = position;
    node.children = [];
    node.count = node.tokens.length;
    node.logprob = mean(node.logprobs);
    node.entropy = mean(node.entropies);
    node.ends = [];
    byId.set(node.id, node);
    byId.get(node.parent).children.push(node);
  });
  root.ends = [];
  tree.trajectories.forEach((trajectory, number) => {
    trajectory.number = number;
    byId.get(trajectory.leaf).ends.push(trajectory);
  });
  for (const trajectory of tree.trajectories) {
    if (trajectory.fallbackAt !== undefined) byId.get(trajectory.fallbackAt).fallback = trajectory;
  }
  return Object.assign(tree, { root, byId, summary });
}

function mean(values) {
  return values && values.length ? values.reduce((a, b) => a + b, 0) / values.length : null;
}

function pathTo(tree, id) {
  const nodes = [];
  for (let node = tree.byId.get(id); node && !node.root; node = tree.byId.get(node.parent)) nodes.push(node);
  return nodes.reverse();
}

// The trajectories through a node, the best reward first.
function through(tree, node) {
  const found = [];
  const visit = (at) => { found.push(...at.ends); at.children.forEach(visit); };
  visit(node);
  return found.sort((a, b) => (b.reward ?? -Infinity) - (a.reward ?? -Infinity));
}

// What can be searched of a tree: its prompt and every whole response, so that a match may cross nodes.
const searchable = [];

async function searchText(position) {
  if (searchable[position] === undefined) {
    const tree = connected(await unpack(position), index.trees[position]);
    const texts = new Set([tree.prompt]);
    for (const t of tree.trajectories) texts.add(pathTo(tree, t.leaf).map((node) => node.text).join(''));
    searchable[position] = [...texts].join('\u0000').toLowerCase();
  }
  return searchable[position];
}
