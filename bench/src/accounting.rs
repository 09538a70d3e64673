//! Every job is accounted for: enqueued = completed + left, nothing completed twice, nothing from nowhere. Pure.

#[derive(Debug, Default, Clone, PartialEq, Eq)]
pub struct Account {
    pub enqueued: usize,
    pub completed: usize,
    pub left: usize,
    pub lost_ids: Vec<i64>,
    pub completed_twice: usize,
    pub left_though_completed: usize,
    pub unknown: usize,
}

impl Account {
    pub fn lost(&self) -> usize {
        self.lost_ids.len()
    }

    pub fn is_clean(&self) -> bool {
        self.lost() == 0 && self.completed_twice == 0 && self.left_though_completed == 0 && self.unknown == 0
    }
}

/// `enqueued`: ids returned by committed enqueues. `completed`: ids whose completion was acknowledged. `left`: ids that
/// the server still lists as open.
pub fn settle(mut enqueued: Vec<i64>, mut completed: Vec<i64>, mut left: Vec<i64>) -> Account {
    enqueued.sort_unstable();
    completed.sort_unstable();
    left.sort_unstable();
    left.dedup();
    let acknowledged = completed.len();
    completed.dedup();
    let is_in = |ids: &[i64], id: &i64| ids.binary_search(id).is_ok();
    Account {
        enqueued: enqueued.len(),
        completed: completed.len(),
        left: left.len(),
        lost_ids: enqueued.iter().copied().filter(|id| !is_in(&completed, id) && !is_in(&left, id)).collect(),
        completed_twice: acknowledged - completed.len(),
        left_though_completed: left.iter().filter(|id| is_in(&completed, id)).count(),
        unknown: completed.iter().chain(&left).filter(|id| !is_in(&enqueued, id)).count(),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_clean_run_settles() {
        assert!(settle(vec![3, 1, 2], vec![2, 1], vec![3]).is_clean());
    }

    #[test]
    fn each_kind_of_damage_is_named() {
        assert_eq!(settle(vec![1, 2], vec![1], vec![]).lost(), 1);
        assert_eq!(settle(vec![1], vec![1, 1], vec![]).completed_twice, 1);
        assert_eq!(settle(vec![1], vec![1], vec![1]).left_though_completed, 1);
        assert_eq!(settle(vec![1], vec![1, 7], vec![]).unknown, 1);
    }
}
