//! Parts of the pages that are made from the models: between `<!-- name -->` and `<!-- /name -->`.

use std::path::PathBuf;

fn path(page: &str) -> PathBuf {
    PathBuf::from(env!("CARGO_MANIFEST_DIR")).join(page)
}

/// The part is as it should be; `AWA_SPEC_ACCEPT=1` writes it.
pub fn check(page: &str, part: &str, lines: &[String]) {
    static WRITING: std::sync::Mutex<()> = std::sync::Mutex::new(());
    let _guard = WRITING.lock().unwrap_or_else(std::sync::PoisonError::into_inner);
    let text = std::fs::read_to_string(path(page)).expect("the page is there");
    let (head, tail) = (format!("<!-- {part} -->\n"), format!("<!-- /{part} -->"));
    let from = text.find(&head).unwrap_or_else(|| panic!("{page} has no {head}")) + head.len();
    let to = text.find(&tail).unwrap_or_else(|| panic!("{page} has no {tail}"));
    let wanted: String = lines.iter().map(|line| format!("{line}\n")).collect();
    // The head of a table stays.
    let kept: usize = text[from..to].split_inclusive('\n').take_while(|line| is_head(line)).map(str::len).sum();
    let found = &text[from + kept..to];
    if found == wanted {
        return;
    }
    if std::env::var("AWA_SPEC_ACCEPT").is_ok() {
        let new = format!("{}{wanted}{}", &text[..from + kept], &text[to..]);
        std::fs::write(path(page), new).expect("the page can be written");
        return;
    }
    panic!("{page}, part {part}, is out of date; AWA_SPEC_ACCEPT=1 writes it. Now:\n{wanted}\nThere:\n{found}");
}

fn is_head(line: &str) -> bool {
    line.trim().is_empty()
        || line.starts_with("|---")
        || line.starts_with("| model |")
        || line.starts_with("| action |")
        || line.starts_with("| property |")
}
