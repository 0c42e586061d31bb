// Gradio's messages show the names of chosen files as HTML, so names lose the letters that would be markup there.
const isMarkup = (files) => [...files].some((file) => /[<>&]/.test(file.name));
const renamed = (files) => {
  const transfer = new DataTransfer();
  for (const file of files) {
    transfer.items.add(new File([file], file.name.replace(/[<>&]/g, "_"), { type: file.type }));
  }
  return transfer;
};

addEventListener(
  "change",
  ({ target }) => {
    if (target.type === "file" && isMarkup(target.files)) target.files = renamed(target.files).files;
  },
  true,
);
addEventListener(
  "drop",
  (event) => {
    if (!event.dataTransfer || !isMarkup(event.dataTransfer.files)) return;
    event.preventDefault();
    event.stopImmediatePropagation();
    const dataTransfer = renamed(event.dataTransfer.files);
    event.target.dispatchEvent(new DragEvent("drop", { bubbles: true, cancelable: true, dataTransfer }));
  },
  true,
);
document.documentElement.dataset.fileNames = "checked"; // from now on
