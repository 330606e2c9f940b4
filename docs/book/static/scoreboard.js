// Show the claims that the menus of the scoreboard choose. Without JavaScript all of them stand there.
document.addEventListener("DOMContentLoaded", () => {
  const board = document.getElementById("claims");
  if (!board) return;
  const names = ["paper", "kind", "verdict"];
  const menus = names.map((name) => document.getElementById(`choose-${name}`));
  const words = document.getElementById("choose-words");
  const rows = [...board.tBodies[0].rows];

  function choose() {
    const text = words.value.toLowerCase();
    let shown = 0;
    for (const row of rows) {
      const fits = names.every((name, i) => !menus[i].value || row.dataset[name] === menus[i].value);
      row.hidden = !(fits && row.textContent.toLowerCase().includes(text));
      if (!row.hidden) shown += 1;
    }
    document.getElementById("chosen").textContent = `${shown} of ${rows.length}`;
  }

  for (const input of [...menus, words]) input.addEventListener("input", choose);
  choose();
});
