// From a number to a colour. Colours are mixed by the browser from the page's variables, so they follow its theme.

const COLOURS = ['advantage', 'value', 'reward', 'logprob', 'entropy'];

function measure(tree, node, colour, estimator) {
  if (node.environment) return null;
  if (colour === 'advantage') return (tree.advantages[estimator] || [])[node.position] ?? null;
  if (colour === 'value') return node.value ?? null;
  if (colour === 'reward') return node.ends.length ? node.ends[0].reward : null;
  return node[colour];
}

// The range of a colour over a tree, and how a number lies in it.
function scaleOf(tree, colour, estimator) {
  const values = tree.nodes.map((node) => measure(tree, node, colour, estimator)).filter((v) => v !== null);
  if (colour === 'advantage') {
    const most = Math.max(1e-9, ...values.map(Math.abs));
    const shown = values.some((v) => v !== 0) ? most : 0;
    return {
      low: signed(-shown), high: signed(shown),
      ramp: 'linear-gradient(90deg in oklab, var(--minus), var(--mid), var(--plus))',
      colour: (v) => (v === null ? 'var(--mid)' : mix(v < 0 ? '--minus' : '--plus', '--mid', Math.abs(v) / most)),
    };
  }
  let low = Math.min(...values), high = Math.max(...values);
  if (colour === 'value' || colour === 'reward') {
    // All of a tree, so that the two are coloured alike; alone, a flat tree would look like a good one.
    low = Math.min(0, tree.summary.low ?? 0);
    high = Math.max(1, tree.summary.high ?? 1);
  } else if (colour === 'logprob') {
    high = 0;
  } else {
    low = 0;
  }
  if (!values.length) [low, high] = [0, 0];
  const hot = colour === 'logprob' || colour === 'entropy';
  const to = hot ? '--hot' : '--high';
  const share = (v) => (high > low ? (v - low) / (high - low) : 0);
  return {
    low: number(low), high: number(high),
    ramp: colour === 'logprob'
      ? 'linear-gradient(90deg in oklab, var(--hot), var(--low))'
      : `linear-gradient(90deg in oklab, var(--low), var(${to}))`,
    colour: (v) => (v === null ? 'var(--low)' : mix(to, '--low', colour === 'logprob' ? 1 - share(v) : share(v))),
  };
}

function mix(to, from, share) {
  const percent = Math.round(100 * Math.min(1, Math.max(0, share)));
  return `color-mix(in oklab, var(${to}) ${percent}%, var(${from}))`;
}

// Behind a token: the less probable, or the more uncertain, the stronger.
function heatOf(node, token, heat) {
  if (heat === 'logprob' && node.logprobs) return behind(-node.logprobs[token] / 4);
  if (heat === 'entropy' && node.entropies) return behind(node.entropies[token] / 3);
  return null;
}

function behind(share) {
  const percent = Math.round(62 * Math.min(1, Math.sqrt(Math.max(0, share))));
  return percent > 4 ? `color-mix(in oklab, var(--hot) ${percent}%, transparent)` : null;
}

function number(value, digits = 2) {
  if (value === null || value === undefined) return '–';
  if (Number.isInteger(value)) return String(value).replace('-', '−');
  return value.toFixed(digits).replace('-', '−');
}

function signed(value, digits = 2) {
  if (value === null || value === undefined) return '–';
  return (value > 0 ? '+' : '') + number(value, digits);
}

function counted(value) {
  return value.toLocaleString('en-US');
}
